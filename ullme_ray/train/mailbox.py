"""Between the ranks and the driver: metrics and notes, errors that no restart cures, and signs of life.

Each rank says once a second that it lives and where in the run it stands. When an operation of all ranks fails or takes too
long, the library below only knows that somebody did not answer; the signs of life tell who.
"""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ullme_ray import telemetry
from ullme_ray.errors import UllmeError
from ullme_ray.progress import Progress
from ullme_ray.spec.job import JobSpec
from ullme_ray.train.trackers import Trackers

_SIGN_EVERY_S = 1.0
_SILENT_S = 5.0  # without a sign of life: a busy rank's thread may come late, five times in a row it does not
SETTLE_S = _SILENT_S + 2 * _SIGN_EVERY_S  # after which a rank that has died counts as silent
_ASK_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Sign:
    """What a rank last said of itself."""

    rank: int
    host: str
    step: int  # optimizer steps done
    doing: str  # such as `computing`
    silent_s: float = 0.0  # since it was said

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host}"

    @property
    def is_silent(self) -> bool:
        return self.silent_s > _SILENT_S


class _Mailbox:
    def __init__(self) -> None:
        self._records: list[dict[str, Any]] = []
        self._failure: UllmeError | None = None
        self._signs: dict[int, tuple[float, Sign]] = {}

    def put(self, record: dict[str, Any]) -> None:
        self._records.append(record)

    def take(self) -> list[dict[str, Any]]:
        records, self._records = self._records, []
        return records

    def fail(self, error: UllmeError) -> None:
        self._failure = self._failure or error

    def failure(self) -> UllmeError | None:
        return self._failure

    def sign(self, sign: Sign) -> None:
        self._signs[sign.rank] = (time.monotonic(), sign)

    def signs(self) -> list[Sign]:
        now = time.monotonic()
        return [Sign(s.rank, s.host, s.step, s.doing, now - at) for _, (at, s) in sorted(self._signs.items())]

    def forget_signs(self) -> None:
        self._signs = {}


def open_mailbox() -> Any:
    """A mailbox in a process of its own on the driver's host: it is lost only together with the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(_Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()


class SignsOfLife:
    """A rank's thread that tells the mailbox once a second where the rank stands; a context manager."""

    def __init__(self, mailbox: Any, rank: int) -> None:
        self._mailbox = mailbox
        self._place = Sign(rank, f"{ray.util.get_node_ip_address()} ({socket.gethostname()})", 0, "starting")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="signs-of-life", daemon=True)

    def __enter__(self) -> SignsOfLife:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()

    def at(self, step: int, doing: str) -> None:
        """Where the rank stands from now on."""
        self._place = Sign(self._place.rank, self._place.host, step, doing)

    @property
    def place(self) -> Sign:
        return self._place

    def _tell(self) -> None:
        while True:
            self._mailbox.sign.remote(self._place)
            if self._stop.wait(_SIGN_EVERY_S):
                return


def read_signs(mailbox: Any) -> list[Sign]:
    """What all ranks last said; empty where the mailbox cannot be reached."""
    try:
        return list(ray.get(mailbox.signs.remote(), timeout=_ASK_TIMEOUT_S))
    except ray.exceptions.RayError:
        return []


def who_did_not_answer(signs: list[Sign], waiting: int) -> str:
    """Which ranks another rank waits for in vain: those without a sign of life, else those that stand elsewhere."""
    others = [sign for sign in signs if sign.rank != waiting]
    own = next((sign for sign in signs if sign.rank == waiting), None)
    found = [sign for sign in others if sign.is_silent]
    if not found and own is not None:
        found = [sign for sign in others if (sign.step, sign.doing) != (own.step, own.doing)]
    if found:
        return f"no answer from {shown(found)}"
    return "all ranks are alive and stand at the same place; the network between them may be at fault"


def shown(signs: list[Sign]) -> str:
    """Ranks by name, with what is known of each."""
    return ", ".join(
        f"{s.name} ({f'last sign of life {s.silent_s:.0f} s ago' if s.is_silent else 'alive'}, {s.doing} after step {s.step})"
        for s in signs
    )


class Watcher:
    """A thread that moves records from the mailbox to the progress bar and the trackers while training runs."""

    def __init__(self, job: JobSpec, mailbox: Any, bar: Progress, trackers: Trackers) -> None:
        assert job.train is not None
        self.job_name, self.max_steps = job.name, job.train.max_steps
        self.mailbox = mailbox
        self.bar = bar
        self.trackers = trackers
        self.last: dict[str, Any] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="train-progress", daemon=True)

    def __enter__(self) -> Watcher:
        self._tell_steps_left(self.max_steps)  # before the first step, which ranks without room never make
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()
        self._tell_steps_left(0)  # for this process may go on for hours with the next stage

    def _watch(self) -> None:
        while True:
            stopping = self._stop.wait(0.5)
            for record in ray.get(self.mailbox.take.remote()):
                if "note" in record:
                    self.bar.note(record["note"])
                    continue
                self.last |= record
                self.bar.update(record["step"], **shown_figures(self.last))
                self.trackers.write(record)
                telemetry.train_record(self.job_name, record)
                self._tell_steps_left(self.max_steps - record["step"])
            if stopping:
                return

    def _tell_steps_left(self, steps: int) -> None:
        telemetry.gauge("ullme_train_steps_left", steps, self.job_name)


_SHORT = {"contrastive_loss": "con", "generation_loss": "gen", "alignment_loss": "align"}


def shown_figures(record: dict[str, Any]) -> dict[str, str]:
    """The figures of a record, short enough for a line of 100 columns; a loss of exactly 0 belongs to no term of the job."""
    parts = {_SHORT.get(name, name.removesuffix("_loss")): value for name, value in record.items() if name.endswith("_loss")}
    shown = {"loss": f"{record['loss']:.3f}"} if "loss" in record else {}
    shown |= {name: f"{value:.3f}" for name, value in parts.items() if value != 0}
    shown |= {name.removeprefix("validation_"): f"{record[name]:.3f}" for name in record if name.startswith("validation_")}
    for name, short, form in (
        ("grad_norm", "grad", "{:.3g}"),
        ("learning_rate", "lr", "{:.1e}"),
        ("tokens_per_s", "tokens/s", "{:,.0f}"),
        ("mfu", "MFU", "{:.0%}" if record.get("mfu", 0.0) >= 0.1 else "{:.1%}"),
    ):
        if name in record:
            shown[short] = form.format(record[name])
    return shown
