"""Commands that work: the whole job, or one of its stages."""

from __future__ import annotations

from typing import Annotated

import typer

from ullme_ray.cli.shared import AsJson, JobFile, Overrides, Verbose, exit_codes, open_job, print_result, stage_job


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
    with exit_codes():
        job = open_job(path, overrides)
        from ullme_ray.run import chosen_stages, run_job

        run_job(job, chosen_stages(job, stages), verbose=verbose)


def train(path: JobFile, overrides: Overrides = None, as_json: AsJson = False, verbose: Verbose = False) -> None:
    """Fine-tune the model and export it; goes on from the last checkpoint."""
    with stage_job("train", path, overrides, as_json, verbose) as job:
        from ullme_ray.ledger import record
        from ullme_ray.run import describe_training
        from ullme_ray.train import run_train

        result = run_train(job)
        record("train", result)
        print_result(result, describe_training(result), as_json)


def mine(path: JobFile, overrides: Overrides = None, as_json: AsJson = False, verbose: Verbose = False) -> None:
    """Make hard negatives for the training data: its rows again, with passages that rank high and are not their positives."""
    with stage_job("mine", path, overrides, as_json, verbose) as job:
        from ullme_ray.mine import run_mine
        from ullme_ray.run import describe_mining

        report = run_mine(job)
        print_result(report, describe_mining(report), as_json)


def evaluate(path: JobFile, overrides: Overrides = None, as_json: AsJson = False, verbose: Verbose = False) -> None:
    """Measure retrieval on held-out queries, before and after training."""
    with stage_job("evaluate", path, overrides, as_json, verbose) as job:
        from ullme_ray.evaluate import run_evaluate

        report = run_evaluate(job)
        print_result(report, report.to_text(), as_json)


def embed(
    path: JobFile,
    overrides: Overrides = None,
    only_plan: Annotated[bool, typer.Option("--dry-run", help="Tell what there is to do, and do nothing.")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Embed the corpus into the table; what is done already is not done again."""
    with stage_job("embed", path, overrides, as_json, verbose, recorded=not only_plan) as job:
        from ullme_ray.embed import dry_run, run_embed
        from ullme_ray.ledger import record

        report = dry_run(job) if only_plan else run_embed(job)
        record("embed", report)
        print_result(report, report.to_text(), as_json)


def serve(path: JobFile, overrides: Overrides = None, verbose: Verbose = False) -> None:
    """Serve the model over HTTP until Ctrl-C."""
    with stage_job("serve", path, overrides, False, verbose) as job:
        from ullme_ray.run import serve_until_interrupted
        from ullme_ray.serve import start_server

        with start_server(job) as server:
            serve_until_interrupted(server)
