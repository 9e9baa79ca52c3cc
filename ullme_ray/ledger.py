"""The ledger of a job: one small file per run in the run folder, from its start to its end, however it ends.

It tells of runs that overlap, that died without an end, and that a schedule wanted but nobody started; none of them does
harm, for a run does all that is left to do. A failed run may be told to a webhook. A ledger that cannot be written never
stops a run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from ullme_ray import logs, storage
from ullme_ray.errors import StorageError, UllmeError
from ullme_ray.progress import duration
from ullme_ray.reach import refused_url
from ullme_ray.spec import JobSpec, RunFolder
from ullme_ray.spec.cluster import ScheduleSpec
from ullme_ray.spec.cron import Cron

logger = logging.getLogger(__name__)

_SEEN_EVERY_S = 60.0
_DEAD_AFTER = timedelta(minutes=5)  # without a sign; clocks of machines may differ by less
_WEBHOOK_ATTEMPTS, _WEBHOOK_TIMEOUT_S = 3, 10.0
_INTERRUPTED = 130


@dataclass
class Run:
    """One run. Times are UTC in ISO 8601."""

    id: str
    stages: tuple[str, ...]
    started: str
    host: str
    seen: str  # last sign of life
    ended: str | None = None
    exit_code: int | None = None
    error: str | None = None
    cost: float | None = None  # by embed.price_per_hour, of the whole run
    results: dict[str, dict[str, Any]] = field(default_factory=dict)  # stage -> its figures
    notes: list[str] = field(default_factory=list)

    def state(self, now: datetime) -> str:
        if self.exit_code is not None:
            return {0: "done", _INTERRUPTED: "stopped"}.get(self.exit_code, "failed")
        return "running" if now - datetime.fromisoformat(self.seen) < _DEAD_AFTER else "died"


_active: Run | None = None


def record(stage: str, result: Any) -> None:
    """Notes what a stage brought: the plain numbers and texts of its result. Nothing happens outside of `recorded`."""
    if _active is not None and is_dataclass(result) and not isinstance(result, type):
        figures = {name: value for name, value in asdict(result).items() if isinstance(value, (int, float, str))}
        _active.results[stage] = figures


@contextlib.contextmanager
def recorded(job: JobSpec, stages: Sequence[str]) -> Iterator[Run]:
    """Keeps the ledger while a run goes on. `notes` of the run tell what a person should know of earlier ones."""
    global _active
    now = datetime.now(UTC)
    run = Run(
        f"{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}", tuple(stages), now.isoformat(), socket.gethostname(), now.isoformat()
    )
    logs.set_up(job=job.name, run=run.id)
    with contextlib.suppress(UllmeError, OSError):
        run.notes = _notes(job, run.stages, runs(job), now)
    _save(job, run)
    stop = threading.Event()
    beat = threading.Thread(target=_keep_seen, args=(job, run, stop), daemon=True, name="ullme-ledger")
    beat.start()
    outer, _active = _active, run
    logger.info("run begins", extra={"stages": list(stages)})
    began = time.monotonic()
    try:
        yield run
        run.exit_code = 0
    except BaseException as error:
        run.exit_code = _INTERRUPTED if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
        run.error = f"{type(error).__name__}: {error}"[:2000]
        raise
    finally:
        _active = outer
        stop.set()
        beat.join(timeout=_WEBHOOK_TIMEOUT_S)
        price = job.embed.price_per_hour if job.embed else None
        run.cost = price * (time.monotonic() - began) / 3600 if price is not None else None
        run.seen = run.ended = datetime.now(UTC).isoformat()
        _save(job, run)
        logger.info("run ends", extra={"exit_code": run.exit_code})
        if run.exit_code:
            _tell_webhook(job, run)


def runs(job: JobSpec) -> list[Run]:
    """All runs of a job, oldest first; entries that cannot be read are left out.

    Raises:
        StorageError: the run folder cannot be listed.
    """
    found = []
    names = {one.name for one in fields(Run)}
    for file in storage.list_files(_folder(job)):
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError, KeyError):
            tree = json.loads(storage.read_text(file.path))
            found.append(Run(**{key: value for key, value in tree.items() if key in names}))
    return sorted(found, key=lambda run: run.id)


def describe_runs(found: Sequence[Run]) -> str:
    """A line per run, newest last."""
    if not found:
        return "no run yet"
    now = datetime.now(UTC)
    lines = [f"{'started (UTC)':<17} {'took':>12} {'state':<10} {'rows':>12} {'tokens':>14} {'cost':>9}  stages"]
    for run in found:
        end = datetime.fromisoformat(run.ended or run.seen)
        took = duration((end - datetime.fromisoformat(run.started)).total_seconds())
        embed = run.results.get("embed", {})
        state = run.state(now) + (f" {run.exit_code}" if run.exit_code else "")
        cost = f"{run.cost:,.2f}" if run.cost is not None else ""
        rows, tokens = (f"{embed[key]:,}" if key in embed else "" for key in ("rows", "tokens"))
        lines.append(
            f"{run.started[:16]:<17} {took:>12} {state:<10} {rows:>12} {tokens:>14} {cost:>9}  {', '.join(run.stages)}"
        )
        if embed:
            fates = ", ".join(f"{embed.get(f'rows_{fate}', 0):,} {fate}" for fate in ("embedded", "copied", "reused", "dead"))
            lines.append(f"{'':<17} rows: {fates}")
        if run.error:
            lines.append(f"{'':<17} {run.error.splitlines()[0][:200]}")
    return "\n".join(lines)


def _folder(job: JobSpec) -> str:
    return storage.join(RunFolder.of(job).root, "ledger")


def _save(job: JobSpec, run: Run) -> None:
    try:
        storage.write_text(storage.join(_folder(job), f"{run.id}.json"), json.dumps(asdict(run), indent=1) + "\n")
    except (StorageError, OSError) as error:
        logger.warning("the ledger of this run cannot be written: %s", error)


def _keep_seen(job: JobSpec, run: Run, stop: threading.Event) -> None:
    while not stop.wait(_SEEN_EVERY_S):
        run.seen = datetime.now(UTC).isoformat()
        _save(job, run)


def _notes(job: JobSpec, stages: Sequence[str], earlier: Sequence[Run], now: datetime) -> list[str]:
    notes = []
    for run in earlier:
        if run.state(now) == "running":
            notes.append(
                f"run {run.id} on {run.host} is still at work; that does no harm to a table, but work may be done twice"
            )
    if earlier and (last := earlier[-1]).state(now) == "died":
        notes.append(f"the last run, {last.id} on {last.host}, ended without a word; this one goes on from what it left")
    if job.schedule is not None:
        scheduled = set(job.schedule.stages) or set(job.stages) - {"serve"}
        alike = [run.started for run in earlier if scheduled <= set(run.stages)]
        if alike and scheduled <= set(stages):
            notes += _missed(job.schedule, alike[-1], now)
    return notes


def _missed(schedule: ScheduleSpec, started: str, now: datetime) -> Iterator[str]:
    since = max(datetime.fromisoformat(started), now - timedelta(days=366))
    due = list(Cron.parse(schedule.cron).between(since, now, schedule.timezone))
    if len(due) > 1:
        yield (
            f"{len(due) - 1} scheduled runs were missed since {started[:16]} UTC, the first at"
            f" {due[0]:%Y-%m-%d %H:%M} {schedule.timezone}; this run does their work too"
        )


def _tell_webhook(job: JobSpec, run: Run) -> None:
    """POSTs what failed. The URL may be a secret in itself, so no message shows it."""
    if job.schedule is None or job.schedule.webhook is None:
        return
    import httpx

    try:
        url = job.schedule.webhook.reveal().get_secret_value()
        refused = refused_url(url, resolve=True)
        if refused or not url.startswith(("https://", "http://")):
            raise UllmeError("it must be an http(s):// URL, of no link-local address")
        content: dict[str, Any] = {"job": job.name, "run": run.id, "exit_code": run.exit_code, "error": run.error}
        content |= {"started": run.started, "ended": run.ended, "host": run.host, "stages": list(run.stages)}
        for attempt in range(_WEBHOOK_ATTEMPTS):
            with contextlib.suppress(httpx.TransportError):
                if httpx.post(url, json=content, timeout=_WEBHOOK_TIMEOUT_S).is_success:
                    return
            time.sleep(attempt)
        raise UllmeError(f"it took the message in none of {_WEBHOOK_ATTEMPTS} tries")
    except (UllmeError, httpx.InvalidURL) as error:
        reason = str(error) if isinstance(error, UllmeError) else "it is no URL"
        logger.warning("schedule.webhook could not be told of the failure: %s", reason)
