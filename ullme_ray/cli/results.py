"""Commands about what a job has made: its table, answers to questions, the report, copies in other stores."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from ullme_ray.cli.shared import AsJson, JobFile, Overrides, exit_codes, open_job, print_result
from ullme_ray.errors import JobFileError, Problem


def table(
    path: JobFile,
    overrides: Overrides = None,
    verify: Annotated[int, typer.Option("--verify", min=0, metavar="ROWS", help="Embed so many rows again and compare.")] = 0,
    vacuum: Annotated[
        int | None,
        typer.Option(
            "--vacuum", min=0, metavar="HOURS", help="Remove files out of the table for so long; let no run be at work."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the embeddings table: versions, rows, size, model, dead letters."""
    with exit_codes(as_json=as_json):
        job = open_job(path, overrides)
        if job.embed is None:
            raise JobFileError(str(path), [Problem("embed", "is missing; `ullme-ray table` needs this section")])
        from dataclasses import asdict

        from ullme_ray.embed import describe_table, remove_old_files, verify_table

        result: dict[str, Any] = {}
        lines = []
        if vacuum is not None:
            result["removed"] = remove_old_files(job, retention_hours=vacuum)
            lines.append(f"{len(result['removed']):,} old files removed")
        overview = describe_table(job)
        result["table"] = asdict(overview)
        lines.append(overview.to_text())
        if verify:
            checked = verify_table(job, num_rows=verify)
            result["verified"] = asdict(checked)
            lines.append(checked.to_text())
        print(json.dumps(result) if as_json else "\n".join(lines))


def search(
    path: JobFile,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to look for.")],
    overrides: Overrides = None,
    top_k: Annotated[int | None, typer.Option("--top-k", min=1, help="Passages to show; search.top_k by default.")] = None,
    where: Annotated[
        list[str] | None,
        typer.Option("--where", metavar="COLUMN=VALUE", help="Only rows that match; also !=, <, >, in. Repeatable."),
    ] = None,
    index: Annotated[str | None, typer.Option("--index", help="exact, bits or faiss; search.index by default.")] = None,
    url: Annotated[
        str | None, typer.Option("--server", "--url", help="A running server; without one the model is loaded here.")
    ] = None,
    key: Annotated[str | None, typer.Option("--key", help="Key of the server, as env:NAME or file:PATH.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print the best passages of the embeddings table for a question."""
    with exit_codes(as_json=as_json):
        job = open_job(path, overrides)
        from ullme_ray.evaluate.search import search as find
        from ullme_ray.run import describe_hits

        limit = top_k or job.search.top_k
        hits = find(job, question, top_k=limit, url=url, key=key, where=where or (), index=index)
        if as_json:
            answers = [{"id": hit.id, "chunk": hit.chunk, "score": hit.score, "columns": hit.columns} for hit in hits]
            print(json.dumps({"question": question, "hits": answers}, default=str))
        else:
            print(describe_hits(question, hits))


def report(
    path: JobFile,
    overrides: Overrides = None,
    queries: Annotated[
        int, typer.Option("--queries", min=0, help="Held-out queries to encode for the similarities; 0 loads no model.")
    ] = 100,
    as_json: AsJson = False,
) -> None:
    """Draw what the run's folder holds as one page: training, retrieval, similarities, corpus, embedding, serving."""
    with exit_codes(as_json=as_json):
        job = open_job(path, overrides)
        from ullme_ray.report.page import write_report

        found = write_report(job, num_queries=queries)
        print_result(found, found.to_text(), as_json)


def export(
    path: JobFile,
    to: Annotated[str, typer.Option("--to", help="The store: lance, faiss, qdrant or pgvector.")],
    target: Annotated[str, typer.Option("--target", help="Folder, http://HOST:6333/COLLECTION, or table.")],
    overrides: Overrides = None,
    secret: Annotated[
        str | None, typer.Option("--secret", help="API key or connection string, as env:NAME or file:PATH.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Copy the embeddings table into a vector store; what the store has already is not written again."""
    with exit_codes(as_json=as_json):
        job = open_job(path, overrides)
        from ullme_ray.vector_stores import run_export

        report = run_export(job, to, target, secret)
        print_result(report, report.to_text(), as_json)
