"""The Ray cluster of a matrix: a head node, where drivers run, and a second node that may die or whose disk may fill up.

It outlives trials, for a node takes ten times as long to start as a driver takes to join. Workers come from a nursery. The
second node keeps Ray's files and its temporary files on a small disk of its own, where this machine lets one be mounted.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import psutil
from nursery import Nursery
from processes import end_processes, environment_set

_CPUS = 2  # of each node
_DISK = "size=192m"


class TwoNodes:
    """A context manager. Nothing of it is left behind."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        nursery = str(folder / "nursery")
        self._environment = {**environment, "FAULTS_NURSERY": nursery}
        self._head_files = Path(tempfile.mkdtemp(prefix="fh-"))  # short, for the paths of sockets are limited to 107 bytes
        self.disk = Path(tempfile.mkdtemp(prefix="fd-"))
        self.no_disk = ""  # why the second node has no disk of its own
        self.nursery = Nursery(nursery, environment)
        self._cluster: Any = None
        self._second: Any = None

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def __enter__(self) -> TwoNodes:
        from ray.cluster_utils import Cluster

        self.no_disk = _mount(self.disk)
        try:
            self.nursery.__enter__()
            with environment_set(self._environment):
                self._cluster = Cluster(
                    initialize_head=True,
                    head_node_args={
                        "num_cpus": _CPUS,
                        "include_dashboard": False,
                        "temp_dir": str(self._head_files),
                        "setup_worker_path": str(Path(__file__).with_name("fork_worker.py")),
                    },
                )
            self.add_second()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._cluster is not None:
            self._cluster.shutdown()
        end_processes([psutil.Process(pid) for pid in self.nursery.workers() if psutil.pid_exists(pid)])
        self.nursery.__exit__()
        if not self.no_disk:
            subprocess.run(["umount", "-l", str(self.disk)], check=False)
        shutil.rmtree(self.disk, ignore_errors=True)
        shutil.rmtree(self._head_files, ignore_errors=True)

    def add_second(self) -> None:
        """A second node, with an empty disk."""
        for entry in self.disk.iterdir():
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink()
        with environment_set({**self._environment, "TMPDIR": str(self.disk)}):
            self._second = self._cluster.add_node(
                num_cpus=_CPUS,
                temp_dir=str(self.disk),
                setup_worker_path=str(Path(__file__).with_name("fork_worker.py")),
            )

    def kill_second(self) -> None:
        """SIGKILL to every process of the second node."""
        (raylet,) = self._second.all_processes["raylet"]
        pid = raylet.process.pid
        victims = []
        with contextlib.suppress(psutil.NoSuchProcess):
            victims = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        for worker in self.nursery.workers(pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                victims.append(psutil.Process(worker))
        end_processes(victims)
        self._cluster.remove_node(self._second, allow_graceful=False)


def _mount(folder: Path) -> str:
    """Why no small disk could be mounted there; empty where it was."""
    try:
        command = ["mount", "-t", "tmpfs", "-o", _DISK, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "there is no mount command"
    return "" if done.returncode == 0 else f"a small disk cannot be mounted here ({done.stderr.strip()})"
