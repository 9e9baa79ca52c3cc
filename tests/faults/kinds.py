"""The faults of the matrix. Each strikes a running job at an instant that the matrix chooses."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from pathlib import Path

from processes import title_of
from proxy import Fate, Spoil
from workbench import Run, Trial, Workbench

_VICTIM_WAIT_S = 5.0
_BURST_S = (0.5, 4.0)


class Fault:
    """One kind: `strike` at each instant."""

    per_run = 5  # instants in one run
    is_crash = True  # loses work that may be done again
    ends_run = False  # the run is not meant to survive it
    exit_code = 0  # of a run that it ended
    unanswered = False  # readers may find the store gone
    overlaps = False  # runs beside one another do the same work twice
    by_reads = False  # instants are shares of the units read, for all are read before most parts are put

    def __init__(self, name: str) -> None:
        self.name = name

    def unavailable(self, bench: Workbench) -> str:
        """Why it cannot be tried on this machine; empty where it can."""
        return ""

    def strike(self, bench: Workbench, trial: Trial, run: Run, chance: random.Random) -> bool:
        """Whether it hit a run that was not over."""
        raise NotImplementedError

    def between_runs(self, bench: Workbench) -> None:
        """Before the same command is given again, and after the last run."""


class KillWorker(Fault):
    """SIGKILL to a process that does one kind of work, known by the title that Ray gives it."""

    def __init__(self, name: str, title: str, *, by_reads: bool = False) -> None:
        super().__init__(name)
        self._title = re.compile(title)
        self.by_reads = by_reads

    def strike(self, bench: Workbench, trial: Trial, run: Run, chance: random.Random) -> bool:
        deadline = time.monotonic() + _VICTIM_WAIT_S
        while time.monotonic() < deadline and not run.over:
            workers = [pid for pid in trial.workers() if "ray::" in title_of(pid)]
            chance.shuffle(workers)
            look_again = time.monotonic() + 0.2
            while time.monotonic() < look_again:  # a task may last but a few milliseconds
                for pid in workers:
                    if self._title.search(title_of(pid)):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                            return True
                time.sleep(0.001)
        return False


class KillWriter(Fault):
    """SIGKILL to an actor while it writes a part, and embeds the next one."""

    def strike(self, bench: Workbench, trial: Trial, run: Run, chance: random.Random) -> bool:
        deadline, before = time.monotonic() + _VICTIM_WAIT_S, len(run.events("writing"))
        while time.monotonic() < deadline and not run.over:
            if written := run.events("writing")[before:]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(written[-1]["pid"], signal.SIGKILL)
                    return True
            time.sleep(0.001)
        return False


class KillDriver(Fault):
    """A signal to the driver alone."""

    ends_run = True

    def __init__(self, name: str, number: signal.Signals, exit_code: int) -> None:
        super().__init__(name)
        self._number = number
        self.exit_code = exit_code

    def strike(self, bench: Workbench, trial: Trial, run: Run, chance: random.Random) -> bool:
        if run.over:
            return False
        os.kill(run.process.pid, self._number)
        return True


class KillNode(Fault):
    """The node without the driver dies whole, and another takes its place."""

    per_run = 2

    def strike(self, bench: Workbench, trial: Trial, run: Run, chance: random.Random) -> bool:
        if run.over:
            return False
        assert bench.nodes is not None
        bench.nodes.kill_second()
        bench.nodes.add_second()
        return True


class SpoilRequests(Fault):
    """A burst of bad answers from the store; it lasts until there was one."""

    is_crash = False

    def __init__(self, name: str, *fates: Fate, share: float) -> None:
        super().__init__(name)
        self._spoil = Spoil(fates, share)

    def strike(self, bench: Workbench, trial: Trial, run: Run, chance: random.Random) -> bool:
        if run.over:
            return False
        begin = len(bench.proxy.log)
        bench.proxy.spoil(self._spoil)
        _sleep_while_running(run, chance.uniform(*_BURST_S))
        while not (hit := any(request.fate != "pass" for request in bench.proxy.log[begin:])) and not run.over:
            time.sleep(0.05)
        bench.proxy.spoil(None)
        return hit


class RestartStore(Fault):
    """SIGKILL to the store, and the same store again."""

    per_run = 2
    is_crash = False
    unanswered = True

    def strike(self, bench: Workbench, trial: Trial, run: Run, chance: random.Random) -> bool:
        if run.over:
            return False
        bench.store.kill()
        bench.store.start()
        bench.store.wait_until_ready()
        return True


class FillDisk(Fault):
    """The disk of the second node (Ray's files there, and TMPDIR) has no byte left, for a while or to the run's end."""

    per_run = 2

    def unavailable(self, bench: Workbench) -> str:
        assert bench.nodes is not None
        return bench.nodes.no_disk

    def strike(self, bench: Workbench, trial: Trial, run: Run, chance: random.Random) -> bool:
        if run.over:
            return False
        with contextlib.suppress(OSError), self._ballast(bench).open("wb", buffering=0) as stream:
            while True:
                stream.write(bytes(2**16))
        if chance.random() < 0.7:  # else it stays full
            _sleep_while_running(run, chance.uniform(*_BURST_S))
            self.between_runs(bench)
        return True

    def between_runs(self, bench: Workbench) -> None:
        self._ballast(bench).unlink(missing_ok=True)

    @staticmethod
    def _ballast(bench: Workbench) -> Path:
        assert bench.nodes is not None
        return bench.nodes.disk / "ballast"


class SecondRun(Fault):
    """The same command while the first one runs."""

    per_run = 1
    is_crash = False
    overlaps = True

    def strike(self, bench: Workbench, trial: Trial, run: Run, chance: random.Random) -> bool:
        if run.over:
            return False
        trial.start()
        return True


FAULTS: dict[str, Fault] = {
    fault.name: fault
    for fault in (
        KillWorker("actor", r"MapWorker.*EmbedActor"),
        KillWorker("read task", r"ray::.*read_step", by_reads=True),
        KillWriter("write"),
        KillNode("node"),
        KillDriver("driver", signal.SIGKILL, -signal.SIGKILL),
        KillDriver("SIGTERM", signal.SIGTERM, 130),
        SpoilRequests("S3 500/503", "error", share=0.7),
        SpoilRequests("S3 slow", "slow", share=0.7),
        SpoilRequests("S3 cut", "cut", "lost", share=0.5),
        RestartStore("S3 restart"),
        FillDisk("disk full"),
        SecondRun("two runs"),
    )
}


def _sleep_while_running(run: Run, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not run.over:
        time.sleep(0.05)
