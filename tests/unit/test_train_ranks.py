"""Who did not answer, how many ranks go on, and which of several errors is told; no Ray cluster, real gloo ranks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.train import ControllerError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2.api.exceptions import WorkerGroupError

from ullme_ray.errors import CollectiveError, DataError, StorageError, TrainingError
from ullme_ray.spec.job import JobSpec, TrainSpec
from ullme_ray.train.collectives import is_collective_error
from ullme_ray.train.mailbox import Sign, who_did_not_answer
from ullme_ray.train.network import interface_of
from ullme_ray.train.ranks import batch_arithmetic, cause_of, is_no_room, ranks_that_fit


def train_spec(global_batch_size: int = 24, **workers: Any) -> TrainSpec:
    train = {"data": [{"path": "x.jsonl"}], "global_batch_size": global_batch_size, "chunk_size": 4, "workers": workers}
    job = JobSpec.model_validate({"name": "x", "model": {"base": "scratch"}, "train": train})
    assert job.train is not None
    return job.train


@pytest.mark.parametrize(
    ("slots", "least", "expected"),
    [
        (8, None, 8),
        (3, None, 8),  # wait for all
        (8, 2, 8),
        (20, 2, 8),
        (7, 2, 6),  # 7 does not divide 24
        (5, 2, 4),
        (2, 2, 2),
        (1, 2, 8),  # fewer than the job allows: wait for all
        (0, 1, 8),
        (5, 5, 8),  # 5 would fit, but does not divide 24
    ],
)
def test_ranks_after_a_loss(slots: int, least: int | None, expected: int) -> None:
    train = train_spec(num_workers=8, min_workers=least)
    assert ranks_that_fit(train, slots) == expected
    assert train.global_batch_size % expected == 0


def test_batch_arithmetic_of_fewer_ranks() -> None:
    train = train_spec(num_workers=8)
    assert batch_arithmetic(train, 8) == "global 24 = 8 ranks x 3 queries; chunk 4 -> 1 chunks; 2 passages per query"
    assert batch_arithmetic(train, 2) == "global 24 = 2 ranks x 12 queries; chunk 4 -> 3 chunks; 2 passages per query"


def sign(rank: int, *, step: int = 7, doing: str = "computing", silent_s: float = 0.5) -> Sign:
    return Sign(rank, f"10.0.0.{rank}", step, doing, silent_s)


def test_silent_ranks_are_named() -> None:
    told = who_did_not_answer([sign(0, silent_s=1), sign(1, silent_s=30), sign(2), sign(3, step=6, silent_s=9)], waiting=0)
    assert told == (
        "no answer from rank 1 on 10.0.0.1 (last sign of life 30 s ago, computing after step 7), "
        "rank 3 on 10.0.0.3 (last sign of life 9 s ago, computing after step 6)"
    )


def test_a_living_rank_elsewhere_is_named() -> None:
    told = who_did_not_answer([sign(0), sign(1, doing="preparing the batch"), sign(2)], waiting=0)
    assert told == "no answer from rank 1 on 10.0.0.1 (alive, preparing the batch after step 7)"
    assert "network between them" in who_did_not_answer([sign(0), sign(1)], waiting=0)
    assert "network between them" in who_did_not_answer([], waiting=0)  # the mailbox could not be asked


def test_the_error_that_tells_most_is_told() -> None:
    waited, own, dead = CollectiveError("waited"), StorageError("store"), RayActorError()
    failures = {0: waited, 1: own, 2: dead}
    error = WorkerGroupError("x", failures)
    assert cause_of(error, DataError("bad"), []).args == ("bad",)
    assert cause_of(error, None, []) is own
    assert cause_of(WorkerGroupError("x", {0: waited, 2: dead}), None, []) is waited
    fault = cause_of(WorkerGroupError("x", {0: dead, 1: ValueError("wrong")}), None, [])
    assert str(fault) == "rank 1 failed: ValueError: wrong"
    told = cause_of(WorkerGroupError("x", {2: dead}), None, [sign(0), sign(1, silent_s=20), sign(2, silent_s=21)])
    assert isinstance(told, TrainingError)  # so that the run starts again
    assert str(told).startswith(
        "rank 2 on 10.0.0.2 (last sign of life 21 s ago, computing after step 7) died, or its host cannot"
    )
    assert str(told).endswith("no answer from rank 1 on 10.0.0.1 (last sign of life 20 s ago, computing after step 7)")
    assert "no room" in str(cause_of(ControllerError(ValueError("no room")), None, []))


def test_only_a_lack_of_room_is_nobodys_failure() -> None:
    assert is_no_room(ControllerError(WorkerGroupStartupTimeoutError(2)))
    assert not is_no_room(ControllerError(WorkerGroupStartupFailedError("x")))
    assert not is_no_room(WorkerGroupError("x", {0: RuntimeError("x")}))


def test_interface_of_an_address() -> None:
    assert interface_of("127.0.0.1") in {name for _, name in socket.if_nameindex()}
    assert interface_of("203.0.113.7") is None  # reserved for documentation: nobody has it


_RANK = """
import datetime, os, sys, time, torch, torch.distributed as dist
from ullme_ray.train.collectives import is_collective_error, limit_of_later_groups
rank, store = int(sys.argv[1]), sys.argv[2]
limit_of_later_groups(2)
limit = datetime.timedelta(seconds=2)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=limit)
later = dist.new_group([0, 1])  # as DeepSpeed makes one, with torch's own limit
dist.barrier()
if rank == 1:
    time.sleep(600)
started = time.monotonic()
for group in (None, later):
    try:
        dist.all_reduce(torch.ones(3), group=group)
    except Exception as error:
        assert is_collective_error(error), error
    else:
        raise SystemExit("the operation ended without the other rank")
assert not is_collective_error(RuntimeError("out of memory"))
print(f"ended after {time.monotonic() - started:.1f} s", flush=True)
os._exit(0)
"""


def test_an_operation_that_hangs_ends_in_the_time_set(tmp_path: Any) -> None:
    """Real ranks: one never comes, and the other gives up, also in a group that a library made later."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _RANK]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], env=environment, stdout=-1, stderr=-1)
        for rank in range(2)
    ]
    try:
        told, errors = ranks[0].communicate(timeout=200)
        assert b"ended after" in told, errors.decode()[-2000:]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_an_error_of_the_process_group_is_told_from_others() -> None:
    peer = RuntimeError("[/x/gloo/transport/tcp/pair.cc:552] Connection closed by peer [10.0.0.2]:9999")
    assert is_collective_error(peer)
    assert not is_collective_error(ValueError("gloo"))
