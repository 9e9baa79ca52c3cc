"""What the commands share: their arguments, the way to a job and to Ray, and errors turned into messages and exit codes."""

from __future__ import annotations

import contextlib
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

JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file; `ullme-ray init` writes one to start from.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="SECTION.KEY=VALUE", help="Values set over those of the file, read as YAML.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for a machine to read.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show what Ray and the workers print.")]


@contextlib.contextmanager
def stage_job(
    stage: str, path: Path, overrides: list[str] | None, as_json: bool, verbose: bool, *, recorded: bool = True
) -> Iterator[JobSpec]:
    """What the commands of single stages share: the job, its checks before long work, and Ray."""
    with exit_codes(as_json=as_json):
        job = open_job(path, overrides)
        if getattr(job, stage) is None:
            raise JobFileError(str(path), [Problem(stage, f"is missing; `ullme-ray {stage}` needs this section")])
        from ullme_ray.run import at_work

        with at_work(job, (stage,), verbose=verbose, recorded_in_ledger=recorded):
            yield job


def open_job(path: Path, overrides: list[str] | None) -> JobSpec:
    from ullme_ray.runtime import quiet_libraries

    job = absolute_paths(load_job(path, overrides or ()))
    quiet_libraries()
    return job


@contextlib.contextmanager
def exit_codes(*, as_json: bool = False) -> Iterator[None]:
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


def print_result(result: Any, text: str, as_json: bool) -> None:
    from dataclasses import asdict

    print(json.dumps(asdict(result), default=str) if as_json else text)
