"""Commands to a Ray cluster elsewhere: submit a job, ask after it, stop it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ullme_ray.cli.shared import JobFile, Overrides, exit_codes
from ullme_ray.spec import load_job

Address = Annotated[
    str | None,
    typer.Option("--address", help="The cluster's Jobs API, such as http://HEAD:8265; RAY_API_SERVER_ADDRESS by default."),
]


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
    with exit_codes():
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


def status(path: JobFile, address: Address = None) -> None:
    """Show the newest submission of a job."""
    with exit_codes():
        job = load_job(path)
        from ullme_ray.deploy.submit import Cluster, describe_status, latest

        print(describe_status(latest(Cluster(address), job.name)))


def logs(path: JobFile, address: Address = None) -> None:
    """Print what the newest submission of a job has written so far."""
    with exit_codes():
        job = load_job(path)
        from ullme_ray.deploy.submit import Cluster, latest

        cluster = Cluster(address)
        print(cluster.log_text(latest(cluster, job.name).submission_id), end="")


def stop(path: JobFile, address: Address = None) -> None:
    """Stop a submitted job; submitting it again goes on where it left off."""
    with exit_codes():
        job = load_job(path)
        from ullme_ray.deploy.submit import Cluster, latest

        cluster = Cluster(address)
        newest = latest(cluster, job.name)
        cluster.stop(newest.submission_id)
        print(f"stopping {newest.submission_id}")
