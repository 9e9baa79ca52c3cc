"""A run's folder on the disk of each node: what its reading processes share there, and memory should not hold.

It lies below the system's temporary folder (TMPDIR) and is made by the first process of a node that asks for it. The run
removes it at its end. What a killed run left goes when another run makes its own on that node: every process holds a lock on
the folder that it uses for as long as it lives, so one without a lock is nobody's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

_PREFIX = "ullme_ray-embed-"
_LOCK = "in_use"
_LEFT_FREE = 0.05  # share of the disk that is left to others


@lru_cache(maxsize=8)
def node_folder(run: str) -> Path:
    """The folder of this run on this node.

    Raises:
        OSError: the temporary folder cannot be written to.
    """
    folder = _folder(run)
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        try:
            lock = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)  # stays open: the lock ends with this process
        except FileNotFoundError:
            continue  # swept away by another run before it was locked
        fcntl.flock(lock, fcntl.LOCK_SH)
        if (folder / _LOCK).exists() and os.path.samestat(os.fstat(lock), os.stat(folder / _LOCK)):
            break
        os.close(lock)
    _sweep(folder.parent)
    return folder


def remove_node_folder(run: str) -> None:
    """Removes the run's folder from this node, whoever still uses it."""
    shutil.rmtree(_folder(run), ignore_errors=True)


def made_once(path: Path, make: Callable[[Path], None]) -> Path:
    """The file or folder `path`, which one process of the node makes while all others wait.

    Args:
        make: writes it whole at the place it is told, over whatever a killed process left there.
    """
    if not path.exists():
        with path.with_name(path.name + ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                unfinished = path.with_name(path.name + ".unfinished")
                make(unfinished)
                os.replace(unfinished, path)
    return path


def has_room(folder: Path, num_bytes: int) -> bool:
    """Whether so much can be written there without taking the disk's last from other processes."""
    disk = shutil.disk_usage(folder)
    return disk.free - num_bytes > _LEFT_FREE * disk.total


def _folder(run: str) -> Path:
    return Path(tempfile.gettempdir()) / (_PREFIX + run)


def _sweep(temporary: Path) -> None:
    """Removes what killed runs left."""
    for folder in temporary.glob(_PREFIX + "*"):
        with contextlib.suppress(OSError):  # another user's, just being made, or swept by another process
            lock = os.open(folder / _LOCK, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
