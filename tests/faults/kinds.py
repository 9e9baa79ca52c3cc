"""The faults of the matrix. Each strikes a running job at an instant that the matrix chooses."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from proxy import Fate, Spoil
from workbench import Run, Trial, Workbench, end_processes, environment_set

_VICTIM_WAIT_S = 5.0
_BURST_S = (0.5, 4.0)


class Fault:
    """One kind. `open` before the first run of a trial, `strike` at each instant, `close` after the last run."""

    per_run = 4  # instants in one run
    is_crash = True  # loses work that may be done again
    ends_run = False  # the run is not meant to survive it
    unanswered = False  # readers may find the store gone
    overlaps = False  # runs beside one another do the same work twice

    def __init__(self, name: str) -> None:
        self.name = name

    def unavailable(self) -> str | None:
        """Why it cannot be tried on this machine."""
        return None

    def open(self, bench: Workbench, trial: Trial) -> dict[str, Any]:
        """What `Trial.start` is given."""
        return {}

    def strike(self, bench: Workbench, trial: Trial, run: Run, chance: random.Random) -> bool:
        """Whether it hit a run that was not over."""
        raise NotImplementedError

    def between_runs(self) -> None:
        """Before the same command is given again."""

    def close(self, bench: Workbench) -> None:
        pass


class KillWorker(Fault):
    """SIGKILL to a process that does one kind of work, known by the title that Ray gives it."""

    def __init__(self, name: str, title: str) -> None:
        super().__init__(name)
        self._title = re.compile(title)

    def strike(self, bench: Workbench, trial: Trial, run: Run, chance: random.Random) -> bool:
        deadline = time.monotonic() + _VICTIM_WAIT_S
        while time.monotonic() < deadline and not run.over:
            workers = [process.pid for process in run.tree() if "ray::" in _title_of(process.pid)]
            chance.shuffle(workers)
            look_again = time.monotonic() + 0.2
            while time.monotonic() < look_again:  # a task may last but a few milliseconds
                for pid in workers:
                    if self._title.search(_title_of(pid)):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                            return True
                time.sleep(0.001)
        return False


class KillDriver(Fault):
    """A signal to the driver alone."""

    ends_run = True

    def __init__(self, name: str, number: signal.Signals) -> None:
        super().__init__(name)
        self._number = number

    def strike(self, bench: Workbench, trial: Trial, run: Run, chance: random.Random) -> bool:
        if run.over:
            return False
        os.kill(run.process.pid, self._number)
        return True


class KillNode(Fault):
    """A cluster of two nodes that the job joins; the one without the driver dies whole, and another takes its place."""

    per_run = 2

    def open(self, bench: Workbench, trial: Trial) -> dict[str, Any]:
        from ray.cluster_utils import Cluster

        self._environment = bench.job_environment(trial.trace)
        with environment_set(self._environment):
            self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
            self._second = self._cluster.add_node(num_cpus=2)
        return {"address": self._cluster.address, "trace": trial.trace}

    def strike(self, bench: Workbench, trial: Trial, run: Run, chance: random.Random) -> bool:
        if run.over:
            return False
        (raylet,) = self._second.all_processes["raylet"]
        victim = psutil.Process(raylet.process.pid)
        end_processes([victim, *victim.children(recursive=True)])
        self._cluster.remove_node(self._second, allow_graceful=False)
        with environment_set(self._environment):
            self._second = self._cluster.add_node(num_cpus=2)
        return True

    def close(self, bench: Workbench) -> None:
        self._cluster.shutdown()


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

    per_run = 1
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
    """The disk with the worker's temporary files (Ray's, and TMPDIR) has no byte left, for a while or to the run's end."""

    per_run = 2

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._mount = Path()

    def unavailable(self) -> str | None:
        folder = Path(tempfile.mkdtemp(prefix="fd-"))
        try:
            done = _mount(folder)
            if done.returncode == 0:
                subprocess.run(["umount", str(folder)], check=False)
                return None
            return f"a small disk cannot be mounted here ({done.stderr.strip()})"
        except FileNotFoundError:
            return "there is no mount command"
        finally:
            folder.rmdir()

    def open(self, bench: Workbench, trial: Trial) -> dict[str, Any]:
        self._mount = Path(tempfile.mkdtemp(prefix="fd-"))
        _mount(self._mount).check_returncode()
        return {"extra": {"RAY_TMPDIR": str(self._mount), "TMPDIR": str(self._mount)}}

    def strike(self, bench: Workbench, trial: Trial, run: Run, chance: random.Random) -> bool:
        if run.over:
            return False
        with contextlib.suppress(OSError), (self._mount / "ballast").open("wb", buffering=0) as stream:
            while True:
                stream.write(bytes(2**16))
        if chance.random() < 0.7:  # else it stays full
            _sleep_while_running(run, chance.uniform(*_BURST_S))
            self.between_runs()
        return True

    def between_runs(self) -> None:
        (self._mount / "ballast").unlink(missing_ok=True)

    def close(self, bench: Workbench) -> None:
        subprocess.run(["umount", "-l", str(self._mount)], check=False)
        shutil.rmtree(self._mount, ignore_errors=True)


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
        KillWorker("read task", r"ray::.*read_step"),
        KillWorker("write task", r"ray::.*write_step"),
        KillNode("node"),
        KillDriver("driver", signal.SIGKILL),
        KillDriver("SIGTERM", signal.SIGTERM),
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


def _title_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


def _mount(folder: Path) -> subprocess.CompletedProcess[str]:
    command = ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)
