"""Fixtures shared by all tests, each made once: a tiny real decoder, a real S3 server (SeaweedFS), a real Ray on this machine.

`ray_local` asks for `s3` first, since Ray's workers inherit the environment that Ray was started with.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: its threads on tiny tensors only wait for one another
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves its workers beside a second process that runs tests

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from s3_server import S3Server

if TYPE_CHECKING:
    from ullme_ray.spec import JobSpec

WORDS = "the a bucket object policy access makes private public list deletes creates key table query returns value request"


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder with a 2-layer Llama of width 32 (random weights, fixed seed) and a byte-level BPE tokenizer."""
    from ullme_ray.model.scratch import build_scratch
    from ullme_ray.spec.job import ScratchSpec

    folder: Path = tmp_path_factory.mktemp("tiny_base")
    build_scratch(
        [WORDS] * 4,
        ScratchSpec(hidden_size=32, layers=2, heads=4, vocab_size=300),
        max_tokens=128,
        seed=7,
        folder=str(folder),
    )
    return str(folder)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """On loopback; this process's AWS_* variables point at it as long as it runs."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        server.start()
        try:
            server.wait_until_ready()
            yield server
        finally:
            server.kill()


@pytest.fixture(scope="session")
def ray_local(s3: S3Server) -> Iterator[None]:
    """A local Ray with 4 logical CPUs, whatever the machine has; never joins a cluster that happens to run here."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=256 * 2**20,
        include_dashboard=False,
        logging_level=logging.WARNING,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This process as the one gloo rank, once for all modules: DeepSpeed keeps the groups that it made of the first."""
    from torch import distributed

    meeting = tmp_path_factory.mktemp("ranks") / "meeting"
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def train_here(one_rank: None) -> Iterator[Callable[[JobSpec], list[str]]]:
    """Trains on one gloo rank, this process, as a rank of Ray Train would; gives the notes that the driver would show."""
    from ullme_ray.model import ensure_base
    from ullme_ray.train.loop import train_on_rank

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            patch.setenv(name, value)

        def train(job: JobSpec) -> list[str]:
            records: list[dict[str, Any]] = []
            ensure_base(job)
            train_on_rank(job, records.append, lambda step, doing: None)
            return [record["note"] for record in records if "note" in record]

        yield train
