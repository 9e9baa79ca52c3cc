"""The command line: parses, delegates, and turns errors into exit codes. 0 done, 1 failed, 2 bad job file or usage.

Imports neither torch nor ray before a command needs them, so `check` and `--help` answer at once.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import json
import shlex
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ullme_ray.errors import JobFileError, Problem, UllmeError
from ullme_ray.spec import JobSpec, absolute_paths, load_job

INTERRUPTED = 130  # what a shell reports for Ctrl-C

app = typer.Typer(
    help="Turn a decoder LLM into a text embedder and put it to work on Ray, from one YAML job file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file; `ullme-ray init` writes one to start from.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="SECTION.KEY=VALUE", help="Values set over those of the file, read as YAML.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for a machine to read.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show what Ray and the workers print.")]


def main() -> None:
    """Entry of `ullme-ray` and `python -m ullme_ray`."""
    app(prog_name="ullme-ray")


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="File to write.")] = Path("job.yaml"),
) -> None:
    """Write a commented starter job file."""
    with _exit_codes():
        try:
            with path.open("x", encoding="utf-8") as stream:
                stream.write(_starter())
        except FileExistsError:
            raise UllmeError(f"{path} exists; remove it or give another name: ullme-ray init OTHER.yaml") from None
        except OSError as error:
            raise UllmeError(f"{path} cannot be written ({error.strerror}); give another place") from None
        print(f"wrote {path}; next: ullme-ray check {path}, then ullme-ray run {path}")


@app.command()
def check(
    path: Annotated[Path | None, typer.Argument(metavar="JOB.yaml", help="The job file.")] = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of job files, for editors.")] = False,
    as_json: AsJson = False,
) -> None:
    """Validate a job file; report every problem with its line and a way out."""
    if schema:
        print(json.dumps(_schema(), indent=2))
        return
    if path is None:
        raise typer.BadParameter("give a job file, or --schema", param_hint="JOB.yaml")
    with _exit_codes(as_json=as_json):
        job = load_job(path, overrides or ())
        if as_json:
            print(json.dumps({"ok": True, "job": job.model_dump(mode="json")}))
        else:
            print(f"{path} is a good job file: {job.name} runs {', '.join(job.stages)}")


@app.command()
def plan(
    path: JobFile,
    overrides: Overrides = None,
    scale: Annotated[
        float | None, typer.Option("--scale", metavar="DOCUMENTS", help="Simulate embedding so many, such as 1e9, instead.")
    ] = None,
    cost: Annotated[
        list[str] | None, typer.Option("--cost", metavar="NAME=VALUE", help="A cost for --scale, such as gpus=256.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what would run: batch arithmetic, steps, parameters, memory per worker, units to embed."""
    with _exit_codes(as_json=as_json):
        job = _open_job(path, overrides)
        from ullme_ray.plan import make_plan, plan_scale

        found = make_plan(job) if scale is None else plan_scale(job, scale, cost or ())
        print(json.dumps(found.as_dict()) if as_json else found.to_text())


@app.command()
def run(
    path: JobFile,
    overrides: Overrides = None,
    stages: Annotated[
        str | None,
        typer.Option("--stages", metavar="A,B", help="Only these, such as train,embed; all of the job's by default."),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Run every stage the job has: train, evaluate, embed, serve, then ask its questions."""
    with _exit_codes():
        job = _open_job(path, overrides)
        from ullme_ray.run import chosen_stages, run_job

        run_job(job, chosen_stages(job, stages), verbose=verbose)


@app.command()
def runs(path: JobFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """List the runs of a job: when, how long, rows by fate, tokens, cost, how they ended."""
    with _exit_codes(as_json=as_json):
        job = _open_job(path, overrides)
        from dataclasses import asdict

        from ullme_ray.ledger import describe_runs
        from ullme_ray.ledger import runs as list_runs

        found = list_runs(job)
        print(json.dumps([asdict(run) for run in found]) if as_json else describe_runs(found))


@app.command()
def render(
    path: JobFile,
    folder: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for the manifests.")],
    overrides: Overrides = None,
) -> None:
    """Write Kubernetes manifests for KubeRay: RayJob, RayService, schedule, network policy; `kubectl apply -k DIR`."""
    with _exit_codes():
        from ullme_ray.deploy import write_manifests

        for written in write_manifests(load_job(path, overrides or ()), folder):
            print(f"wrote {written}")


@app.command()
def train(path: JobFile, overrides: Overrides = None, as_json: AsJson = False, verbose: Verbose = False) -> None:
    """Fine-tune the model and export it; goes on from the last checkpoint."""
    with _stage("train", path, overrides, as_json, verbose) as job:
        from ullme_ray.ledger import record
        from ullme_ray.run import describe_training
        from ullme_ray.train import run_train

        result = run_train(job)
        record("train", result)
        _print_result(result, describe_training(result), as_json)


@app.command()
def mine(path: JobFile, overrides: Overrides = None, as_json: AsJson = False, verbose: Verbose = False) -> None:
    """Make hard negatives for the training data: its rows again, with passages that rank high and are not their positives."""
    with _stage("mine", path, overrides, as_json, verbose) as job:
        from ullme_ray.mine import run_mine
        from ullme_ray.run import describe_mining

        report = run_mine(job)
        _print_result(report, describe_mining(report), as_json)


@app.command()
def evaluate(path: JobFile, overrides: Overrides = None, as_json: AsJson = False, verbose: Verbose = False) -> None:
    """Measure retrieval on held-out queries, before and after training."""
    with _stage("evaluate", path, overrides, as_json, verbose) as job:
        from ullme_ray.evaluate import run_evaluate

        report = run_evaluate(job)
        _print_result(report, report.to_text(), as_json)


@app.command()
def embed(
    path: JobFile,
    overrides: Overrides = None,
    only_plan: Annotated[bool, typer.Option("--dry-run", help="Tell what there is to do, and do nothing.")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Embed the corpus into the table; what is done already is not done again."""
    with _stage("embed", path, overrides, as_json, verbose, recorded=not only_plan) as job:
        from ullme_ray.embed import dry_run, run_embed
        from ullme_ray.ledger import record

        report = dry_run(job) if only_plan else run_embed(job)
        record("embed", report)
        _print_result(report, report.to_text(), as_json)


@app.command()
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
    with _exit_codes(as_json=as_json):
        job = _open_job(path, overrides)
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


@app.command()
def serve(path: JobFile, overrides: Overrides = None, verbose: Verbose = False) -> None:
    """Serve the model over HTTP until Ctrl-C."""
    with _stage("serve", path, overrides, False, verbose) as job:
        from ullme_ray.run import serve_until_interrupted
        from ullme_ray.serve import start_server

        with start_server(job) as server:
            serve_until_interrupted(server)


@app.command()
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
    with _exit_codes(as_json=as_json):
        job = _open_job(path, overrides)
        from ullme_ray.evaluate.search import search as find
        from ullme_ray.run import describe_hits

        limit = top_k or job.search.top_k
        hits = find(job, question, top_k=limit, url=url, key=key, where=where or (), index=index)
        if as_json:
            answers = [{"id": hit.id, "chunk": hit.chunk, "score": hit.score, "columns": hit.columns} for hit in hits]
            print(json.dumps({"question": question, "hits": answers}, default=str))
        else:
            print(describe_hits(question, hits))


@app.command()
def report(
    path: JobFile,
    overrides: Overrides = None,
    queries: Annotated[
        int, typer.Option("--queries", min=0, help="Held-out queries to encode for the similarities; 0 loads no model.")
    ] = 100,
    as_json: AsJson = False,
) -> None:
    """Draw what the run's folder holds as one page: training, retrieval, similarities, corpus, embedding, serving."""
    with _exit_codes(as_json=as_json):
        job = _open_job(path, overrides)
        from ullme_ray.report.page import write_report

        found = write_report(job, num_queries=queries)
        _print_result(found, found.to_text(), as_json)


@app.command()
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
    with _exit_codes(as_json=as_json):
        job = _open_job(path, overrides)
        from ullme_ray.vector_stores import run_export

        report = run_export(job, to, target, secret)
        _print_result(report, report.to_text(), as_json)


Address = Annotated[
    str | None,
    typer.Option("--address", help="The cluster's Jobs API, such as http://HEAD:8265; RAY_API_SERVER_ADDRESS by default."),
]


@app.command()
def submit(
    path: JobFile,
    overrides: Overrides = None,
    address: Address = None,
    stages: Annotated[str | None, typer.Option("--stages", metavar="A,B", help="Only these; by default all.")] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not follow the job; it runs on by itself.")] = False,
    retries: Annotated[int, typer.Option("--retries", min=0, help="How often a killed driver is submitted again.")] = 3,
) -> None:
    """Run a job on a cluster elsewhere: its log is followed, its exit code kept; run it again to follow it again."""
    code = 0
    with _exit_codes():
        job = load_job(path, overrides or ())
        from ullme_ray.deploy.submit import Cluster, submit_job

        code = submit_job(
            job,
            Cluster(address),
            stages=stages,
            wait=not no_wait,
            retries=retries,
            write=lambda text: print(text, end="", flush=True),
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )
    if code:
        raise typer.Exit(code)


@app.command()
def status(path: JobFile, address: Address = None) -> None:
    """Show the newest submission of a job."""
    with _exit_codes():
        job = load_job(path)
        from ullme_ray.deploy.submit import Cluster, describe_status, latest

        print(describe_status(latest(Cluster(address), job.name)))


@app.command()
def logs(path: JobFile, address: Address = None) -> None:
    """Print what the newest submission of a job has written so far."""
    with _exit_codes():
        job = load_job(path)
        from ullme_ray.deploy.submit import Cluster, latest

        cluster = Cluster(address)
        print(cluster.log_text(latest(cluster, job.name).submission_id), end="")


@app.command()
def stop(path: JobFile, address: Address = None) -> None:
    """Stop a submitted job; submitting it again goes on where it left off."""
    with _exit_codes():
        job = load_job(path)
        from ullme_ray.deploy.submit import Cluster, latest

        cluster = Cluster(address)
        newest = latest(cluster, job.name)
        cluster.stop(newest.submission_id)
        print(f"stopping {newest.submission_id}")


@contextlib.contextmanager
def _stage(
    stage: str, path: Path, overrides: list[str] | None, as_json: bool, verbose: bool, *, recorded: bool = True
) -> Iterator[JobSpec]:
    """What the commands of single stages share: the job, its checks before long work, and Ray."""
    with _exit_codes(as_json=as_json):
        job = _open_job(path, overrides)
        if getattr(job, stage) is None:
            raise JobFileError(str(path), [Problem(stage, f"is missing; `ullme-ray {stage}` needs this section")])
        from ullme_ray.run import at_work

        with at_work(job, (stage,), verbose=verbose, recorded_in_ledger=recorded):
            yield job


def _open_job(path: Path, overrides: list[str] | None) -> JobSpec:
    from ullme_ray.runtime import quiet_libraries

    job = absolute_paths(load_job(path, overrides or ()))
    quiet_libraries()
    return job


@contextlib.contextmanager
def _exit_codes(*, as_json: bool = False) -> Iterator[None]:
    """Errors of ours become a message and a code; others keep their traceback, for they are faults to report."""
    try:
        yield
    except UllmeError as error:
        if as_json:
            print(json.dumps(_as_dict(error)))
        else:
            print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        again = shlex.join(["ullme-ray", *sys.argv[1:]])
        print(f"\nstopped; the same command goes on where this one left off: {again}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except Exception:  # noqa: BLE001 - the border of the program
        traceback.print_exc()
        print("error: the fault above is in ullme_ray or a library, not in your job file; please report it", file=sys.stderr)
        raise typer.Exit(1) from None


def _as_dict(error: UllmeError) -> dict[str, Any]:
    problems = [
        {"where": problem.where, "line": problem.line, "message": problem.message}
        for problem in (error.problems if isinstance(error, JobFileError) else [])
    ]
    return {"ok": False, "error": type(error).__name__, "message": str(error), "problems": problems}


def _print_result(result: Any, text: str, as_json: bool) -> None:
    from dataclasses import asdict

    print(json.dumps(asdict(result), default=str) if as_json else text)


def _starter() -> str:
    return importlib.resources.files("ullme_ray").joinpath("starter.yaml").read_text(encoding="utf-8")


def _schema() -> dict[str, Any]:
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **JobSpec.model_json_schema()}
