"""Contestants of a bench, each in a process of its own that waits while another runs. None outlives the bench."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import psutil
import torch
import torch.multiprocessing as mp

_CLOSE_S = 60.0  # for a contestant to end what works for it


class _Failure(NamedTuple):
    """An error of the contestant's, as text: not every exception can be sent."""

    told: str


class SideProcess:
    """A contestant that lives elsewhere. Starting returns at once; `answer` waits until it is there."""

    def __init__(self, name: str, make: Callable[[], Any], *, threads: int) -> None:
        """`make` gives the contestant, in its own process: a class or function of a module, or a partial of one."""
        self.name = name
        context = mp.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(make, threads, other))  # no daemon: it may have processes
        self._process.start()
        other.close()

    def call(self, method: str, *arguments: Any) -> Any:
        self._connection.send((method, arguments))
        return self.answer()

    def answer(self) -> Any:
        """What the last call gave; before the first call, None once the contestant is there.

        Raises:
            RuntimeError: it failed, or its process died.
        """
        try:
            answer = self._connection.recv()
        except EOFError:
            raise RuntimeError(f"the process of {self.name} died; look at its output above (out of memory?)") from None
        if isinstance(answer, _Failure):
            raise RuntimeError(f"{self.name}:\n{answer.told}")
        return answer

    def close(self) -> None:
        """Lets it end in its own way."""
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self._process.join(_CLOSE_S)
        self.kill()

    def kill(self) -> None:
        """Ends it, and all that it started."""
        if self._process.pid is not None and self._process.is_alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                _kill_below(psutil.Process(self._process.pid))
            self._process.kill()
        self._process.join()


@contextlib.contextmanager
def side_processes(sides: Mapping[str, Callable[[], Any]], *, threads: int) -> Iterator[dict[str, SideProcess]]:
    """All sides by name, started at the same time, for the length of a `with` block.

    An error, Ctrl-C or SIGTERM ends them at once.
    """
    processes: dict[str, SideProcess] = {}
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # for good: a bench has no other use for it
    try:
        for name, make in sides.items():
            processes[name] = SideProcess(name, make, threads=threads)
        for process in processes.values():
            began = time.monotonic()
            process.answer()
            print(f"  {process.name} is there after {time.monotonic() - began:.1f} s more", file=sys.stderr)
        yield processes
    except BaseException:
        for process in processes.values():
            process.kill()
        raise
    finally:
        for process in processes.values():
            process.close()


def _serve(make: Callable[[], Any], threads: int, connection: Any) -> None:
    """A side's process: answers each call with what came of it, errors with their text, until None comes."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    torch.set_num_threads(threads)
    try:
        contestant = make()
        connection.send(None)
        while (call := connection.recv()) is not None:
            method, arguments = call
            connection.send(getattr(contestant, method)(*arguments))
        contestant.close()
    except EOFError:  # the asking process ended
        pass
    except BaseException:  # noqa: BLE001 - told in the asking process, which stops
        with contextlib.suppress(OSError):
            connection.send(_Failure(traceback.format_exc()))
    finally:
        _kill_below(psutil.Process())


def _end_with_parent() -> None:
    """However the asking process ends, SIGKILL included, nothing goes on that might hold a GPU's memory."""
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    _kill_below(psutil.Process())
    os._exit(1)


def _kill_below(process: psutil.Process) -> None:
    """SIGKILL to all that a process started, and to what they started."""
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
