"""The Ray Data pipeline from units to parts: tasks read, a pool of actors embeds, tasks write. A unit is one block throughout.

It runs in a Ray task beside the caller, so that what Ray Data has to say goes to Ray's logs and not into the job's own output.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, cast

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ullme_ray.embed.actor import EmbedActor, EmbedContext, Outcome, outcome_of, read_step, unit_row, write_step
from ullme_ray.embed.attempts import Attempts
from ullme_ray.embed.units import Unit, embed_section
from ullme_ray.errors import EmbedError, UllmeError
from ullme_ray.spec.job import ActorsSpec

MAX_ATTEMPTS = 6  # at a unit, or at loading the model; nodes come and go, so a few deaths are nobody's fault
_ACTOR_START_DEATHS = 5  # in a row
_NO_PROGRESS_TIMEOUT_S = 4 * 3600.0  # a large unit on a CPU takes longer than Ray's 30 minutes


def run_units(units: list[Unit], context: EmbedContext) -> Iterator[Outcome]:
    """What became of each unit, as they are done, in any order.

    Raises:
        UllmeError: whatever a step raised on purpose, or with Ray's reason for anything else.
    """
    pool_limit = _pool_limit(embed_section(context.job).actors, len(units))
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    flow = ray.remote(num_cpus=0, max_retries=0)(_flow).options(scheduling_strategy=here)
    attempts = Attempts(MAX_ATTEMPTS)  # held here as long as the flow runs, for Ray ends an actor that nobody holds
    outcomes: Any = flow.remote(units, context, attempts, pool_limit)
    try:
        for reference in outcomes:
            yield ray.get(reference)
    except ray.exceptions.RayError as error:
        raise explained(error) from error
    finally:
        ray.cancel(outcomes)  # no effect on one that came to its end


def _flow(units: list[Unit], context: EmbedContext, attempts: Attempts, pool_limit: int) -> Iterator[Outcome]:
    import ray.data
    from ray.data.exceptions import ExecutionTimeoutError

    data_context = ray.data.DataContext.get_current()
    data_context.enable_progress_bars = False  # ours counts rows
    data_context.max_consecutive_actor_init_deaths = _ACTOR_START_DEATHS
    data_context.execution_no_progress_timeout_s = _NO_PROGRESS_TIMEOUT_S
    actors = embed_section(context.job).actors
    dataset = (
        ray.data.from_items([unit_row(unit) for unit in units], override_num_blocks=len(units))
        .map(
            cast(Any, read_step),
            fn_args=(context, attempts),
            # A limit that is not the pool's keeps Ray from fusing this step into the actors, where the model would wait.
            compute=ray.data.TaskPoolStrategy(size=len(units) + 1),
            num_cpus=1,
        )
        .map(
            cast(Any, EmbedActor),  # Ray's hints know functions of one argument only
            fn_constructor_args=(context, attempts),
            compute=ray.data.ActorPoolStrategy(min_size=actors.min, max_size=pool_limit),
            num_cpus=actors.cpus_per_actor,
            num_gpus=actors.gpus_per_actor,
        )
        .map(cast(Any, write_step), fn_args=(context,), num_cpus=1)
    )
    try:
        for row in dataset.iter_rows():
            yield outcome_of(row)
    except (ray.exceptions.RayError, ExecutionTimeoutError) as error:
        raise explained(error) from error


def _pool_limit(actors: ActorsSpec, num_units: int) -> int:
    """The most actors that leave a CPU for reading and writing: a pool that takes all would wait for its own input for ever.

    Raises:
        EmbedError: not even the smallest pool fits this cluster.
    """
    cluster = ray.cluster_resources()
    cpus, gpus = cluster.get("CPU", 0.0), cluster.get("GPU", 0.0)
    fits = int((cpus - 1) // actors.cpus_per_actor)
    if fits < actors.min:
        raise EmbedError(
            f"embed.actors.min = {actors.min} actors of {actors.cpus_per_actor} CPUs, and one CPU to read and write, are "
            f"{actors.min * actors.cpus_per_actor + 1} CPUs, and this Ray cluster has {cpus:g}; lower them or add nodes"
        )
    if actors.gpus_per_actor * actors.min > gpus:
        raise EmbedError(
            f"embed.actors.min = {actors.min} actors of {actors.gpus_per_actor:g} GPUs are "
            f"{actors.gpus_per_actor * actors.min:g} GPUs, and this Ray cluster has {gpus:g}; lower them or add nodes"
        )
    return max(actors.min, min(actors.max, fits, num_units))


def explained(error: Exception) -> UllmeError:
    """The error that a task raised on purpose; anything else as an EmbedError with the first error of Ray's long report."""
    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, UllmeError):
        return error.cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    root = next((line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)), lines[-1])
    return EmbedError(f"embedding stopped: {root}; the next run goes on from the parts written so far")
