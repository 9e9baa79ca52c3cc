"""Processes without the seconds of their imports: forked from one that has imported all that a driver and a worker need.

`python tests/faults/nursery.py SOCKET`. A request is one JSON object {"argv", "env", "cwd", "driver"} with the three standard
streams beside it. The forked process takes all of them over and does what `python argv...` would do, so what runs is what users
run, but for the time of the imports: on a busy machine they are most of a short job. A driver gets a session of its own, and
the connection stays open to tell its pid and, when it ended, how.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from typing import Any

_MODULES = """
aiobotocore.session aiohttp colorama deltalake fsspec google.protobuf grpc httpx jsonschema msgpack numpy pandas psutil
pyarrow.compute pyarrow.csv pyarrow.dataset pyarrow.fs pyarrow.json pyarrow.parquet pydantic requests rich.progress ruamel.yaml
s3fs tokenizers torch transformers transformers.models.auto.modeling_auto transformers.models.llama.modeling_llama typer yaml
ullme_ray.model ullme_ray.model.encoder ullme_ray.table
"""  # not Ray, which takes its settings from the environment when it is imported


def serve(path: str) -> dict[str, Any]:
    """Forks on request; returns in the forked process alone, with what it shall run."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for workers
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        print("ready", flush=True)
        while True:
            link, _ = listener.accept()
            with link:
                data, streams, _, _ = socket.recv_fds(link, 2**20, 3)
                if not data:
                    return {}
                while not data.endswith(b"\n"):
                    data += link.recv(2**20)
                request: dict[str, Any] = json.loads(data)
                if os.fork() == 0:
                    listener.close()
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    if request["driver"]:
                        _bear_driver(link)
                    else:
                        with open(f"{path}.workers", "a") as stream:
                            stream.write(f"{os.getpid()} {request['env']['RAY_RAYLET_PID']}\n")
                    _take_over(request, streams)
                    return request
                for stream in streams:
                    os.close(stream)


def _bear_driver(link: socket.socket) -> None:
    """Forks once more and returns in the driver alone; this process waits for it, tells its end, and ends too."""
    child = os.fork()
    if child == 0:
        os.setsid()
        return
    with contextlib.suppress(OSError):  # who asked may be gone
        link.sendall(f"{child}\n".encode())
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(OSError):
        link.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _take_over(request: dict[str, Any], streams: list[int]) -> None:
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.argv = request["argv"]


class Nursery:
    """A context manager: the process that forks."""

    def __init__(self, path: str, env: dict[str, str]) -> None:
        self.path = path
        self._env = env
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Nursery:
        command = [sys.executable, __file__, self.path]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=self._env)
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError("the nursery did not start")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def workers(self, raylet: int | None = None) -> list[int]:
        """Pids of the living workers of one node, or of all."""
        assert self._process is not None
        born: dict[int, int] = {}
        with contextlib.suppress(FileNotFoundError), open(f"{self.path}.workers") as stream:
            born = {int(pid): int(parent) for pid, parent in map(str.split, stream)}
        with (
            contextlib.suppress(FileNotFoundError),
            open(f"/proc/{self._process.pid}/task/{self._process.pid}/children") as stream,
        ):
            alive = {int(pid) for pid in stream.read().split()}
            return [pid for pid, parent in born.items() if pid in alive and raylet in (None, parent)]
        return []

    def driver(self, argv: list[str], env: dict[str, str], cwd: str, told: int) -> Driver:
        return Driver(self.path, argv, env, cwd, told)


class Driver:
    """A driver that a nursery bore; waits as subprocess.Popen does."""

    def __init__(self, path: str, argv: list[str], env: dict[str, str], cwd: str, told: int) -> None:
        self.returncode: int | None = None
        self._link = socket.socket(socket.AF_UNIX)
        self._link.connect(path)
        ask(self._link, argv, env, cwd, [told, told, told], driver=True)
        self._lines = b""
        line = self._line(60.0)
        assert line, "the nursery bore no driver"
        self.pid = int(line)

    def _line(self, timeout: float | None) -> bytes:
        """The next line, or what came of it before the keeper ended."""
        self._link.settimeout(timeout)
        while b"\n" not in self._lines and (data := self._link.recv(64)):
            self._lines += data
        line, _, self._lines = self._lines.partition(b"\n")
        return line

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            try:
                line = self._line(timeout)
            except (TimeoutError, BlockingIOError) as error:
                raise subprocess.TimeoutExpired("driver", timeout or 0.0) from error
            self.returncode = int(line)
            self._link.close()
        return self.returncode


def ask(link: socket.socket, argv: list[str], env: dict[str, str], cwd: str, streams: list[int], *, driver: bool) -> None:
    request = json.dumps({"argv": argv, "env": env, "cwd": cwd, "driver": driver}) + "\n"
    data = request.encode()
    sent = socket.send_fds(link, [data], streams)
    link.sendall(data[sent:])


if __name__ == "__main__":
    from importlib import import_module

    for name in _MODULES.split():
        import_module(name)
    if request := serve(sys.argv[1]):
        sys.path[0] = request["cwd"]
        if request["driver"]:
            runpy.run_module(request["argv"][0], run_name="__main__", alter_sys=False)
        else:
            runpy.run_path(request["argv"][0], run_name="__main__")
