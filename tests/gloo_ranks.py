"""Real gloo ranks on this machine, forked from a process that has done the imports, which take ten seconds."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

_IMPORTED_ONCE = [
    "grl_reference",
    "transformers.models.llama.modeling_llama",
    "ullme_ray.train.checkpoint",
    "ullme_ray.train.deepspeed",
]


def run_ranks(work: Callable[..., None], world_size: int, *args: Any) -> None:
    """Runs `work(rank, world_size, port, *args)` in as many processes, and raises what one of them raised.

    The environment of the ranks is that of the first call in this process.
    """
    multiprocessing.set_forkserver_preload(_IMPORTED_ONCE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(work, args=(world_size, port, *args), nprocs=world_size, start_method="forkserver")
