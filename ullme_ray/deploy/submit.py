"""`ullme-ray submit`, `status`, `logs`, `stop`: a job file through Ray's Jobs API, on a cluster that runs elsewhere.

What travels is the resolved job file and this package's source, about half a megabyte: no data, no dependency, no secret. The
cluster's machines have the dependencies installed (cluster/Dockerfile) and the secrets' variables set.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ullme_ray.errors import UllmeError
from ullme_ray.runtime import quiet_libraries
from ullme_ray.spec.job import JobSpec
from ullme_ray.spec.run_folder import absolute_paths, dump_job

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
STOPPED = 130  # exit code of a job that was stopped, as of one that is stopped by Ctrl-C
_OWN_CODES = (0, 1, 2, STOPPED)  # of a driver that ended by itself; any other means that something killed it
_NAME = "ullme_job"  # of the metadata that holds the job's name
_POLL_S = 1.0
_OUTAGE_S = 300.0  # of the way to the cluster, such as a port-forward that is opened again
RESUBMIT_AFTER_S = 5.0  # in which what a killed driver had started ends by itself
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")

Say = Callable[[str], None]


class _Log:
    """A log that every new connection sends from its beginning: each character is written once."""

    def __init__(self, write: Say) -> None:
        self._write, self._written, self._seen = write, 0, 0

    def begin(self) -> None:
        self._seen = 0

    def add(self, text: str) -> None:
        new = text[max(0, self._written - self._seen) :]
        self._seen += len(text)
        if new:
            self._write(new)
            self._written = self._seen


class Cluster:
    """The Jobs API of one cluster.

    Raises:
        UllmeError: nothing answers there, or it wants another token.
    """

    def __init__(self, address: str | None) -> None:
        quiet_libraries()
        given = address or next((os.environ[name] for name in _ADDRESS_VARIABLES if os.environ.get(name)), DEFAULT_ADDRESS)
        self.address = given if "://" in given else f"http://{given}"
        with self._explained("reach"), _without(_ADDRESS_VARIABLES):  # which Ray would take instead of the address
            from ray.job_submission import JobSubmissionClient

            self._client = JobSubmissionClient(self.address)

    def jobs(self, name: str) -> list[Any]:
        """All submissions of a job by its name, oldest first."""
        with self._explained("ask"):
            found = [details for details in self._client.list_jobs() if (details.metadata or {}).get(_NAME) == name]
        return sorted((details for details in found if details.submission_id), key=lambda details: details.start_time or 0)

    def details(self, submission: str) -> Any:
        with self._explained("ask"):
            return self._client.get_job_info(submission)

    def submit(self, job: JobSpec, stages: str | None) -> str:
        """Sends the job; gives the name of the submission: `NAME-1`, then `NAME-2`, ..."""
        used = {details.submission_id for details in self.jobs(job.name)}
        submission = next(name for n in range(1, len(used) + 2) if (name := f"{job.name}-{n}") not in used)
        with packed(job) as folder, self._explained("submit to"):
            return str(
                self._client.submit_job(
                    entrypoint="python -m ullme_ray run job.yaml" + (f" --stages {stages}" if stages else ""),
                    submission_id=submission,
                    runtime_env={"working_dir": folder},
                    metadata={_NAME: job.name},
                )
            )

    def stop(self, submission: str) -> None:
        with self._explained("stop a job of"):
            self._client.stop_job(submission)

    def log_text(self, submission: str) -> str:
        with self._explained("ask"):
            return str(self._client.get_job_logs(submission))

    def follow(self, submission: str, write: Say) -> Any:
        """Writes the log as it grows until the job has ended; gives its details then.

        Raises:
            UllmeError: the cluster has not answered for five minutes.
        """
        log, seen_at = _Log(write), time.monotonic()
        while True:
            try:
                details = self.details(submission)
                seen_at = time.monotonic()
            except UllmeError:
                if time.monotonic() - seen_at > _OUTAGE_S:
                    raise
                details = None
            with contextlib.suppress(Exception):  # a connection that breaks off is made again, after what was written
                asyncio.run(self._tail(submission, log))
            if details is not None and details.status.is_terminal():
                return details
            time.sleep(_POLL_S)

    async def _tail(self, submission: str, log: _Log) -> None:
        log.begin()
        async for text in self._client.tail_job_logs(submission):
            log.add(text)

    @contextlib.contextmanager
    def _explained(self, action: str) -> Iterator[None]:
        try:
            yield
        except UllmeError:
            raise
        except Exception as error:  # Ray, requests and aiohttp have no common base
            if type(error).__name__ == "AuthenticationError":
                raise UllmeError(
                    f"the cluster at {self.address} refuses the token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the"
                    " file with the token that the cluster was started with"
                ) from error
            reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
            way_out = "; start it, correct --address, or open a way there (kubectl port-forward, ray dashboard)"
            end = way_out if action == "reach" else ""
            raise UllmeError(f"cannot {action} the cluster at {self.address} ({reason}){end}") from error


def submit_job(
    job: JobSpec,
    cluster: Cluster,
    *,
    stages: str | None,
    wait: bool,
    retries: int,
    write: Say,
    say: Say,
    pause_s: float = RESUBMIT_AFTER_S,
) -> int:
    """Submits a job, or follows it where it runs already; one whose driver was killed is submitted again and resumes.

    Args:
        retries: how often a killed driver is replaced, each time after `pause_s`.
        write: gets the driver's output.
        say: gets sentences about the submission.

    Returns:
        The exit code: the driver's own, or 130 for a job that was stopped.
    """
    running = [details for details in cluster.jobs(job.name) if not details.status.is_terminal()]
    if running:
        submission = str(running[-1].submission_id)
        say(f"{submission} is running already")
    else:
        submission = cluster.submit(job, stages)
        say(f"submitted {submission} to {cluster.address}")
    while True:
        if not wait:
            return 0
        details = cluster.follow(submission, write)
        code = exit_code(details)
        if code is not None:
            say(f"{submission} {details.status.value.lower()}" + (f", exit code {code}" if code else ""))
            return code
        if retries <= 0:
            say(f"{submission} was killed: {details.message}")
            return 1
        retries -= 1
        time.sleep(pause_s)
        say(f"{submission} was killed; submitting it again, {retries} tries left")
        submission = cluster.submit(job, stages)


def exit_code(details: Any) -> int | None:
    """Of a job that has ended; None where its driver did not end by itself."""
    if details.status.value == "STOPPED":
        return STOPPED
    if details.status.value == "SUCCEEDED":
        return 0
    return details.driver_exit_code if details.driver_exit_code in _OWN_CODES else None


def latest(cluster: Cluster, name: str) -> Any:
    """The newest submission of a job.

    Raises:
        UllmeError: there is none.
    """
    found = cluster.jobs(name)
    if not found:
        raise UllmeError(f"no job {name} was submitted to the cluster at {cluster.address}; ullme-ray submit does that")
    return found[-1]


def describe_status(details: Any) -> str:
    """`docs-search-2 RUNNING for 73 s`."""
    end = details.end_time or time.time() * 1000
    took = f" for {(end - details.start_time) / 1000:,.0f} s" if details.start_time else ""
    code = f", exit code {details.driver_exit_code}" if details.driver_exit_code else ""
    message = f": {details.message.splitlines()[0]}" if details.message and details.status.value == "FAILED" else ""
    return f"{details.submission_id} {details.status.value}{took}{code}{message}"


@contextlib.contextmanager
def packed(job: JobSpec) -> Iterator[str]:
    """A temporary folder with all that travels: `job.yaml`, resolved, and the source of this package."""
    with tempfile.TemporaryDirectory(prefix="ullme-submit-") as folder:
        inside = absolute_paths(job)
        inside = inside.model_copy(update={"cluster": inside.cluster.model_copy(update={"address": "auto"})})
        (Path(folder) / "job.yaml").write_text(dump_job(inside), encoding="utf-8")
        package = Path(__file__).parents[1]
        shutil.copytree(package, Path(folder) / package.name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        yield folder


@contextlib.contextmanager
def _without(variables: tuple[str, ...]) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in variables if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
