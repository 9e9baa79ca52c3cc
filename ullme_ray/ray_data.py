"""What the stages that run on Ray Data share: where the pipeline runs, how large its pool may be, when it gives up, its errors.

A pipeline runs in a Ray task beside the caller, so that what Ray Data has to say goes to Ray's logs and not into the job's own
output.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ullme_ray.errors import UllmeError
from ullme_ray.spec.cluster import WorkerGroupSpec
from ullme_ray.spec.job import ActorsSpec

MAX_ATTEMPTS = 6  # at a piece of work, or at loading the model; nodes come and go, so a few deaths are nobody's fault
_ACTOR_START_DEATHS = 5  # in a row
_NO_PROGRESS_TIMEOUT_S = 4 * 3600.0  # a large unit on a CPU takes longer than Ray's 30 minutes


@dataclass(frozen=True)
class Stage:
    """How one stage speaks of its failures."""

    error: type[UllmeError]
    pool: str  # the section of the job that sizes its actors
    work: str  # what stopped
    next_run: str  # what another run will do
    lighter: str  # what the user can lower


class _Counts:
    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, work: str) -> int:
        self._begun[work] += 1
        return self._begun[work]

    def done(self, work: str) -> None:
        del self._begun[work]


class Attempts:
    """How often work was begun that may end its own process. Ray Data begins it again without end, so somebody must say stop.

    Counts in a process of its own on this node, which outlives those it counts for: elsewhere it would die with its node,
    and everybody would wait for it until Ray noticed. Can be sent to them.
    """

    def __init__(self, stage: Stage, limit: int) -> None:
        self._stage = stage
        self._limit = limit
        counts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Counts)
        self._counts: Any = counts.options(scheduling_strategy=_on_this_node()).remote()

    @contextlib.contextmanager
    def at(self, work: str, *, shown: str) -> Iterator[int]:
        """Counts an attempt at some work, gives its number, and starts over once one ends otherwise than with its process.

        Args:
            work: tells it from all other work.
            shown: how the error names it.

        Raises:
            UllmeError: the stage's, once as many attempts in a row as are allowed ended their process.
        """
        attempt = ray.get(self._counts.begin.remote(work))
        if attempt > self._limit:
            raise self._stage.error(
                f"{shown} ended its process {self._limit} times, as a lack of memory does; "
                f"{self._stage.lighter}, or give an actor more memory"
            )
        try:
            yield attempt
        finally:
            self._counts.done.remote(work)


def _on_this_node() -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def run_beside(stage: Stage, flow: Callable[..., Iterator[Any]], *args: Any) -> Iterator[tuple[Any, Any]]:
    """(reference, value) of what `flow(*args, attempts)` yields, as it comes; the flow runs in a task on this node.

    Raises:
        UllmeError: whatever the flow raised on purpose, or the stage's error with Ray's reason for anything else.
    """
    attempts = Attempts(stage, MAX_ATTEMPTS)  # held here as long as the flow runs, for Ray ends an actor that nobody holds
    task = ray.remote(num_cpus=0, max_retries=0)(flow).options(scheduling_strategy=_on_this_node())
    results: Any = task.remote(*args, attempts)
    try:
        for reference in results:
            yield reference, ray.get(reference)
    except ray.exceptions.RayError as error:
        raise explained(stage, error) from error
    finally:
        ray.cancel(results)  # no effect on one that came to its end


def configure_ray_data() -> None:
    """Settings of every pipeline, made in the process that runs it."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours counts rows
    context.target_max_block_size = 1  # byte: a row is work of its own, and leaves each step as a block
    context.max_consecutive_actor_init_deaths = _ACTOR_START_DEATHS
    context.execution_no_progress_timeout_s = _NO_PROGRESS_TIMEOUT_S


def pool_limit(stage: Stage, actors: ActorsSpec, num_units: int, groups: Sequence[WorkerGroupSpec] = ()) -> int:
    """The most actors that leave a CPU for reading and writing: a pool that takes all would wait for its own input for ever.

    Args:
        groups: the job's, of workers; where an autoscaler starts them, those that are not there yet count too.

    Raises:
        UllmeError: the stage's, when not even the smallest pool fits this cluster.
    """
    cpus, gpus = _resources(groups)
    fits = int((cpus - 1) // actors.cpus_per_actor)
    if fits < actors.min:
        raise stage.error(
            f"{stage.pool}.min = {actors.min} actors of {actors.cpus_per_actor} CPUs, and one CPU to read and write, are "
            f"{actors.min * actors.cpus_per_actor + 1} CPUs, and this Ray cluster has {cpus:g}; lower them or add nodes"
        )
    if actors.gpus_per_actor * actors.min > gpus:
        raise stage.error(
            f"{stage.pool}.min = {actors.min} actors of {actors.gpus_per_actor:g} GPUs are "
            f"{actors.gpus_per_actor * actors.min:g} GPUs, and this Ray cluster has {gpus:g}; lower them or add nodes"
        )
    return max(actors.min, min(actors.max, fits, num_units))


def _resources(groups: Sequence[WorkerGroupSpec]) -> tuple[float, float]:
    """CPUs and GPUs of the nodes that are there, or, if these are more, of those that an autoscaler may start."""
    there = ray.cluster_resources()
    cpus, gpus = there.get("CPU", 0.0), there.get("GPU", 0.0)
    if any(group.max > group.min for group in groups):
        cpus = max(cpus, sum(group.max * group.cpus for group in groups))
        gpus = max(gpus, sum(group.max * group.gpus for group in groups))
    return cpus, gpus


def explained(stage: Stage, error: Exception) -> UllmeError:
    """The error that a task raised on purpose; anything else as the stage's, with the first error of Ray's long report."""
    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, UllmeError):
        return error.cause
    if isinstance(error, ray.exceptions.OutOfMemoryError) or "OutOfMemoryError" in str(error):
        return stage.error(
            f"{stage.work} stopped: Ray killed a process, since its node's memory was nearly full; {stage.lighter}, take fewer "
            f"{stage.pool}.max on a node, or nodes with more memory; {stage.next_run}"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    root = next((line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)), lines[-1])
    return stage.error(f"{stage.work} stopped: {root}; {stage.next_run}")
