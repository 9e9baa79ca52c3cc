"""The servers of tests/bench/serve.py: ours, and infinity-emb in a virtual environment of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

# Pinned to what it was written for: transformers and huggingface_hub of before their next major version, a click that its typer
# knows. optimum is left out, whose BetterTransformer it would import and transformers no longer has.
INFINITY = (
    "infinity-emb[torch,server]==0.0.77",
    "transformers<5",
    "huggingface_hub<1",
    "sentence-transformers==3.4.1",
    "click<8.2",
)
NAME = "bench"
# Neither server calls home, and Ray's workers are no more patient (its niceness is 15) than infinity's process and the clients.
_ALIKE = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "RAY_worker_niceness": "0"}
_START_S = 300.0
_STOP_S = 60.0


@dataclass(frozen=True)
class Setting:
    """What both servers share."""

    model: str  # a local sentence-transformers folder
    max_tokens: int
    dtype: str
    threads: int  # of the model; HTTP, tokenizer and the clients take what the machine has beside them
    folder: str  # for logs and job files


class Side:
    """A server as a process; a context manager."""

    name = ""
    path = ""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}{self.path}"
        self.log = Path(setting.folder, f"{type(self).__name__}.log")

    def command(self) -> list[str]:
        raise NotImplementedError

    def __enter__(self) -> Side:
        threads = str(self.setting.threads)
        environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads} | _ALIKE
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self.command(), stdout=log, stderr=log, env=environment)
        deadline = time.monotonic() + _START_S
        while not self._is_healthy():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise RuntimeError(f"{self.name} did not start:\n{self.log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.5)
        return self

    def __exit__(self, *_: object) -> None:
        left = psutil.Process(self._process.pid).children(recursive=True) if self._process.poll() is None else []
        self._process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_S)
        for process in [*left, self._process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def _is_healthy(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{self.port}/health", timeout=5, trust_env=False).status_code == 200
        return False

    def memory_bytes(self) -> int:
        """Of all its processes, what none of them shares."""
        process = psutil.Process(self._process.pid)
        total = 0
        for each in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += each.memory_full_info().uss
        return total


class Ours(Side):
    name = "ours"
    path = "/v1/embeddings"

    def __init__(self, setting: Setting, *, adapters: dict[str, str] | None = None, gpus: float = 0) -> None:
        super().__init__(setting)
        self._adapters, self._gpus = adapters or {}, gpus

    def command(self) -> list[str]:
        setting = self.setting
        job: dict[str, Any] = {
            "name": NAME,
            "storage": f"{setting.folder}/runs",
            "model": {"base": setting.model, "dtype": setting.dtype, "max_tokens": setting.max_tokens, "bidirectional": False},
            "serve": {
                "port": self.port,
                "cpus_per_replica": setting.threads,
                "gpus_per_replica": self._gpus,
                "adapters": [{"name": name, "path": path} for name, path in self._adapters.items()],
            },
        }
        file = Path(setting.folder, "job.yaml")
        file.write_text(json.dumps(job))
        return [sys.executable, "-m", "ullme_ray", "serve", str(file)]


class Infinity(Side):
    """As its command line starts it, with its defaults; only what a CPU and this model need is set."""

    name = "infinity-emb 0.0.77"
    path = "/embeddings"

    def __init__(self, setting: Setting, environment: Path, *, device: str) -> None:
        super().__init__(setting)
        self._environment, self._device = environment, device

    def command(self) -> list[str]:
        options = {
            "--model-id": self.setting.model,
            "--served-model-name": NAME,
            "--port": str(self.port),
            "--host": "127.0.0.1",
            "--engine": "torch",
            "--device": self._device,
            "--dtype": self.setting.dtype,
        }
        words = [word for option in options.items() for word in option]
        return [str(self._environment / "bin" / "infinity_emb"), "v2", *words, "--no-bettertransformer"]


def make_infinity(environment: Path) -> None:
    """A virtual environment with infinity-emb, made where it does not exist; some minutes."""
    if (environment / "bin" / "infinity_emb").exists():
        return
    import torch

    print(f"installing {INFINITY[0]} into {environment}", file=sys.stderr)
    venv.create(environment, with_pip=True)
    subprocess.run(
        [environment / "bin" / "pip", "install", "-q", *INFINITY, f"torch=={torch.__version__.partition('+')[0]}"], check=True
    )
