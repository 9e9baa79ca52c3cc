"""Commands about a job file: write one, check it, plan it, list its runs, render it for Kubernetes."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ullme_ray.cli.shared import AsJson, JobFile, Overrides, exit_codes, open_job
from ullme_ray.errors import UllmeError
from ullme_ray.spec import JobSpec, load_job


def init(
    path: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="File to write.")] = Path("job.yaml"),
) -> None:
    """Write a commented starter job file."""
    with exit_codes():
        try:
            with path.open("x", encoding="utf-8") as stream:
                stream.write(_starter())
        except FileExistsError:
            raise UllmeError(f"{path} exists; remove it or give another name: ullme-ray init OTHER.yaml") from None
        except OSError as error:
            raise UllmeError(f"{path} cannot be written ({error.strerror}); give another place") from None
        print(f"wrote {path}; next: ullme-ray check {path}, then ullme-ray run {path}")


def check(
    path: Annotated[Path | None, typer.Argument(metavar="JOB.yaml", help="The job file.")] = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of job files, for editors.")] = False,
    as_json: AsJson = False,
) -> None:
    """Validate a job file; report every problem with its line and a way out."""
    if schema:
        print(json.dumps(job_schema(), indent=2))
        return
    if path is None:
        raise typer.BadParameter("give a job file, or --schema", param_hint="JOB.yaml")
    with exit_codes(as_json=as_json):
        job = load_job(path, overrides or ())
        if as_json:
            print(json.dumps({"ok": True, "job": job.model_dump(mode="json")}))
        else:
            print(f"{path} is a good job file: {job.name} runs {', '.join(job.stages)}")


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
    with exit_codes(as_json=as_json):
        job = open_job(path, overrides)
        from ullme_ray.plan import make_plan, plan_scale

        found = make_plan(job) if scale is None else plan_scale(job, scale, cost or ())
        print(json.dumps(found.as_dict()) if as_json else found.to_text())


def runs(path: JobFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """List the runs of a job: when, how long, rows by fate, tokens, cost, how they ended."""
    with exit_codes(as_json=as_json):
        job = open_job(path, overrides)
        from dataclasses import asdict

        from ullme_ray.ledger import describe_runs
        from ullme_ray.ledger import runs as list_runs

        found = list_runs(job)
        print(json.dumps([asdict(run) for run in found]) if as_json else describe_runs(found))


def render(
    path: JobFile,
    folder: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for the manifests.")],
    overrides: Overrides = None,
) -> None:
    """Write Kubernetes manifests for KubeRay: RayJob, RayService, schedule, network policy; `kubectl apply -k DIR`."""
    with exit_codes():
        from ullme_ray.deploy import write_manifests

        for written in write_manifests(load_job(path, overrides or ()), folder):
            print(f"wrote {written}")


def _starter() -> str:
    return importlib.resources.files("ullme_ray").joinpath("starter.yaml").read_text(encoding="utf-8")


def job_schema() -> dict[str, Any]:
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **JobSpec.model_json_schema()}
