"""The ranks' life as the driver sees it: started on Ray Train, and started again on what is left when some are lost.

Ray Train's own restarts would always wait for as many ranks as before. Here each start looks at the cluster, so that with
`train.workers.min_workers` a run goes on with fewer; any number of ranks reads any checkpoint.
"""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Callable
from typing import Any

import ray
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ullme_ray.errors import CollectiveError, TrainingError, UllmeError
from ullme_ray.progress import Progress
from ullme_ray.spec.job import JobSpec, TrainSpec
from ullme_ray.spec.run_folder import dump_job
from ullme_ray.train.mailbox import Sign, read_signs, shown
from ullme_ray.train.network import NetworkConfig

_FAILED = (ray.train.TrainingFailedError, ray.exceptions.RayActorError)  # the second: Ray Train's controller itself died
_LOST = (ray.exceptions.RayActorError, WorkerHealthCheckFailedError)
_ANSWER_S = 10.0  # a node that takes longer to run nothing is cut off or dying
_DEAD_NODE_S = 120.0  # at most until Ray itself declares such a node dead; it does so in 23 s with cluster settings of README


def run_ranks(job: JobSpec, mailbox: Any, bar: Progress, entry: Callable[[dict[str, Any]], None]) -> None:
    """Runs `entry({"job": ..., "mailbox": ...})` on every rank until all have come to its end.

    Raises:
        UllmeError: one that no restart cures, or what ended the run after `train.max_failures` restarts.
    """
    train = job.train
    assert train is not None
    failures, world_size = 0, train.workers.num_workers
    others = placement_groups()
    while True:
        bar.note(batch_arithmetic(train, world_size))
        ray.get(mailbox.forget_signs.remote())
        try:
            _trainer(job, world_size, mailbox, entry).fit()
            if (fatal := ray.get(mailbox.failure.remote())) is not None:
                raise fatal
            return
        except _FAILED as error:
            free_placement_groups(placement_groups() - others)
            if is_no_room(error):
                bar.note(f"the cluster has no room for {world_size} ranks at present; waiting")
            else:
                failures += 1
                fatal = ray.get(mailbox.failure.remote())
                cause = cause_of(error, fatal, read_signs(mailbox))
                if fatal is not None or failures > train.max_failures:
                    raise cause from None
                bar.note(f"{cause}; starts again from the last checkpoint ({failures} of {train.max_failures} restarts)")
        world_size = ranks_that_fit(train, _slots(train))


def placement_groups() -> set[str]:
    """Ids of the placement groups that this driver's processes have made and that still hold resources or wait for some."""
    job = ray.get_runtime_context().get_job_id()  # with which the id of all that its processes make ends
    return {id_ for id_, row in placement_group_table().items() if row["state"] != "REMOVED" and id_.endswith(job)}


def free_placement_groups(ids: set[str]) -> None:
    """Removes what a start has left, so that its CPUs and GPUs are there for the next.

    Ray Train does so itself, unless its controller dies with the ranks, as when Ray kills processes for want of memory: its
    cleaner then asks the state API whether the controller lives, and without a dashboard never learns that it does not.
    """
    for id_ in ids:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(id_))))


def _trainer(job: JobSpec, world_size: int, mailbox: Any, entry: Callable[[dict[str, Any]], None]) -> _Trainer:
    train = job.train
    assert train is not None
    workers = train.workers
    return _Trainer(
        entry,
        train_loop_config={"job": dump_job(job), "mailbox": mailbox},
        scaling_config=ScalingConfig(
            num_workers=world_size,
            use_gpu=workers.gpus_per_worker > 0,
            resources_per_worker={"CPU": workers.cpus_per_worker}
            | ({"GPU": workers.gpus_per_worker} if workers.gpus_per_worker else {}),
        ),
        torch_config=NetworkConfig(backend="nccl" if workers.gpus_per_worker else "gloo", timeout_s=workers.timeout_s),
        run_config=RunConfig(
            # Checkpoints are ours (train/checkpoint.py). Ray's own state of the run is never resumed: its snapshot file is
            # written in place, and a crash in mid-write would make the run impossible to restart.
            name=f"{job.name}-{uuid.uuid4().hex[:8]}",
            storage_path=tempfile.mkdtemp(prefix="ullme-ray-train-"),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),  # type: ignore[call-arg]  # restarts are ours
        ),
    )


class _Trainer(TorchTrainer):
    """Leaves Ctrl-C an exception; Ray Train (2.60) puts a handler in its place that ends the process with 0, as if done."""

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


def batch_arithmetic(train: TrainSpec, world_size: int) -> str:
    """`global 512 = 16 ranks x 32 queries; chunk 8 -> 4 chunks; 2 passages per query`."""
    per_rank = train.global_batch_size // world_size
    chunks = -(-per_rank // train.chunk_size)
    passages = train.positives_per_query + train.negatives_per_query
    return (
        f"global {train.global_batch_size} = {world_size} ranks x {per_rank} queries; "
        f"chunk {train.chunk_size} -> {chunks} chunks; {passages} passages per query"
    )


def ranks_that_fit(train: TrainSpec, slots: int) -> int:
    """How many ranks to start where the cluster has room for `slots`.

    All, unless the job allows fewer: then the most that divide the global batch. Where not even the fewest fit, all are asked
    for, and Ray waits until nodes come.
    """
    workers = train.workers
    if workers.min_workers is None or slots >= workers.num_workers:
        return workers.num_workers
    fitting = [n for n in range(workers.min_workers, slots + 1) if train.global_batch_size % n == 0]
    return max(fitting, default=workers.num_workers)


def _slots(train: TrainSpec) -> int:
    """Ranks that the living nodes have room for; waits until Ray has noticed which nodes those are."""
    deadline = time.monotonic() + _DEAD_NODE_S
    while True:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        answering = _answering({node["NodeID"] for node in nodes})
        if len(answering) == len(nodes) or time.monotonic() > deadline:
            break
    needs = {"CPU": train.workers.cpus_per_worker, "GPU": train.workers.gpus_per_worker}
    return sum(
        min(int(node["Resources"].get(name, 0) // each) for name, each in needs.items() if each)
        for node in nodes
        if node["NodeID"] in answering
    )


def _answering(node_ids: set[str]) -> set[str]:
    asked = {
        _say_nothing.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(): node_id
        for node_id in node_ids
    }
    done, pending = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_S, fetch_local=False)
    for reference in pending:
        ray.cancel(reference, force=True)
    return {asked[reference] for reference in done if not _failed(reference)}


@ray.remote(num_cpus=0, max_retries=0)
def _say_nothing() -> None:
    pass


def _failed(reference: Any) -> bool:
    try:
        ray.get(reference, timeout=_ANSWER_S)
    except ray.exceptions.RayError:
        return True
    return False


def is_no_room(error: Exception) -> bool:
    """Whether ranks did not start since the cluster had no room for them in time, which is nobody's failure."""
    return isinstance(error, ControllerError) and isinstance(error.controller_failure, WorkerGroupStartupTimeoutError)


def cause_of(error: Exception, failure: UllmeError | None, signs: list[Sign]) -> UllmeError:
    """What the ranks failed of, as an error of ours.

    Of several, first what no restart cures, then a rank's own error, then one that tells which rank did not answer: a rank that
    only lost its connection to another knows the least.
    """
    if failure is not None:
        return failure
    if isinstance(error, ray.exceptions.RayActorError):
        return TrainingError(f"Ray Train's controller died, for want of memory or with its host ({_first_lines(error)})")
    causes: dict[int, Exception] = dict(sorted(getattr(error, "worker_failures", {}).items()))
    ours = [cause for cause in causes.values() if isinstance(cause, UllmeError)]
    if ours:
        return min(ours, key=lambda cause: isinstance(cause, CollectiveError))
    lost = [rank for rank, cause in causes.items() if isinstance(cause, _LOST)]
    for rank, cause in causes.items():
        if rank not in lost:
            return TrainingError(f"rank {rank} failed: {type(cause).__name__}: {_first_lines(cause)}")
    if lost:
        # NCCL ends a rank's process when its time limit is over; the rank that it waited for is then silent, but not lost.
        silent = [sign for sign in signs if sign.rank not in lost and sign.is_silent]
        others = f"; no answer from {shown(silent)}" if silent else ""
        known = [sign for sign in signs if sign.rank in lost]
        return CollectiveError(
            f"{shown(known) or f'rank {lost[0]}'} died, or its host cannot be reached ({_first_lines(causes[lost[0]])}){others}"
        )
    return TrainingError(f"training failed: {_first_lines(error)}")


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:200]
