"""One driver per training run: a lock file in the run folder, created if it is not there, rewritten while its driver lives.

Two drivers on one folder would write each other's checkpoints and metrics. Whether the holder still lives is not a matter
of clocks: on this machine the process is looked for, elsewhere the file must change within a minute. A driver that was
killed therefore holds nobody up where it ran, and a minute at most elsewhere. A store without conditional puts has no
lock.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from ullme_ray import storage
from ullme_ray.errors import StorageError, TrainingError
from ullme_ray.spec import JobSpec, RunFolder
from ullme_ray.store_probes import keeps_exclusive_puts, put_if_absent

BEAT_S = 15.0
SILENT_S = 60.0  # without a beat: four of them


@dataclass(frozen=True)
class Holder:
    """A driver: the run's random id, where it runs, and how often it has written the file."""

    id: str
    host: str
    machine: str  # boot and process namespace, in which `pid` means something
    pid: int
    born: str  # of the process, against numbers that are used again
    beat: int = 0

    @classmethod
    def this(cls) -> Holder:
        return cls(uuid.uuid4().hex, socket.gethostname(), _machine(), os.getpid(), _born(os.getpid()))

    @property
    def is_dead(self) -> bool:
        """Seen from its own machine; False where it cannot be known."""
        return self.machine == _machine() and _born(self.pid) != self.born


class RunLock:
    """A context manager around the work of a driver.

    Args:
        note: gets a sentence when there is something to wait for, or no lock to be had.

    Raises:
        TrainingError: on entering, where another driver is at work in the run folder.
    """

    def __init__(
        self, job: JobSpec, note: Callable[[str], None], *, silent_s: float = SILENT_S, beat_s: float = BEAT_S
    ) -> None:
        self.folder = RunFolder.of(job).root
        self.path = storage.join(self.folder, "train.lock")
        self.me = Holder.this()
        self._note, self._silent_s, self._beat_s = note, silent_s, beat_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> RunLock:
        try:
            if not keeps_exclusive_puts(self.folder):
                raise StorageError("it ignores If-None-Match")
        except StorageError as error:
            self._note(f"{self.folder} cannot be locked ({error}); let only one run at a time train there")
            return self
        while not put_if_absent(self.path, _text(self.me)):
            self._wait_for_the_end_of_another()
        self._thread = threading.Thread(target=self._keep_beating, name="train-lock", daemon=True)
        self._thread.start()
        return self

    def _wait_for_the_end_of_another(self) -> None:
        """Returns once the file is gone: given back, or taken away from a holder that is dead or silent."""
        first = self._read()
        if first is None:
            return
        deadline = time.monotonic() + self._silent_s
        if not first.is_dead:
            self._note(
                f"a run on {first.host} (process {first.pid}) may be training here; looking {self._silent_s:.0f} s for a sign"
            )
        while not first.is_dead and time.monotonic() < deadline:
            time.sleep(min(1.0, self._silent_s / 10))
            now = self._read()
            if now is None:
                return
            if now != first:
                raise TrainingError(
                    f"{self.folder} is being trained by a run on {now.host} (process {now.pid}); wait for its end,"
                    f" stop it, or give this job another name"
                )
        if self._read() == first:
            storage.remove(self.path)

    def _read(self) -> Holder | None:
        try:
            return Holder(**json.loads(storage.read_text(self.path)))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise TrainingError(f"{self.path} is damaged ({error}); if no other run trains here, remove it") from error

    def _keep_beating(self) -> None:
        beat = 0
        while not self._stop.wait(self._beat_s):
            with contextlib.suppress(StorageError, TrainingError, OSError):  # a store that is away for a while
                held = self._read()
                if held is None or held.id != self.me.id:
                    self._note(f"another run took {self.path} over, as this one was silent; stop one of the two")
                    return
                beat += 1
                storage.write_bytes(self.path, _text(Holder(**{**asdict(self.me), "beat": beat})))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(StorageError, TrainingError, OSError):
            held = self._read()
            if held is not None and held.id == self.me.id:
                storage.remove(self.path)


def _text(holder: Holder) -> bytes:
    return json.dumps(asdict(holder)).encode()


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {socket.gethostname()}"
    except OSError:  # no Linux: never the same machine, so nobody is taken for dead at once
        return uuid.uuid4().hex


def _born(pid: int) -> str:
    """When a process began, in ticks since the machine did; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
