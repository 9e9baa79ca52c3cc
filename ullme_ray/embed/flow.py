"""The Ray Data pipeline from units to parts: tasks read, a pool of actors embeds and writes. A unit is one block.

Ray Data puts all blocks that it is given into its object store before it reads the first, at a millisecond each. So the
units of a large run enter several in a block and are parted by a task that needs no CPU: it waits as long as reading goes
on, and one that waits with a CPU could keep an actor from its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from ullme_ray.embed.steps import EmbedActor, EmbedContext, Outcome, outcome_of, read_step, unit_row
from ullme_ray.embed.units import Unit, embed_section
from ullme_ray.errors import EmbedError
from ullme_ray.ray_data import Attempts, Stage, configure_ray_data, explained, pool_limit, run_beside

STAGE = Stage(
    error=EmbedError,
    pool="embed.actors",
    work="embedding",
    next_run="the next run goes on from the parts written so far",
    lighter="lower embed.tokens_per_batch or embed.rows_per_unit",
)
MOST_BLOCKS = 10_000  # that a run begins with


@dataclass(frozen=True)
class Steps:
    """What happens to a unit, as `ullme_ray.embed.steps` has it."""

    read: Callable[..., Any] = read_step
    actor: Callable[..., Any] = EmbedActor


def run_units(units: list[Unit], context: EmbedContext, steps: Steps = Steps()) -> Iterator[Outcome]:
    """What became of each unit, as they are done, in any order.

    Raises:
        UllmeError: whatever a step raised on purpose, or with Ray's reason for anything else.
    """
    cluster = context.job.cluster
    groups = cluster.groups_for("embed") if cluster.address is not None else ()  # a local Ray starts none
    most = pool_limit(STAGE, embed_section(context.job).actors, len(units), groups)
    blocks = min(len(units), MOST_BLOCKS)
    for _, outcome in run_beside(STAGE, _flow, units, context, blocks, most, steps):
        yield outcome


def _flow(
    units: list[Unit], context: EmbedContext, num_blocks: int, most_actors: int, steps: Steps, attempts: Attempts
) -> Iterator[Outcome]:
    import ray.data
    from ray.data.exceptions import ExecutionTimeoutError

    configure_ray_data()
    actors = embed_section(context.job).actors
    alone: ray.data.Dataset = ray.data.from_items([unit_row(unit) for unit in units], override_num_blocks=num_blocks)
    if num_blocks < len(units):
        alone = alone.map(_as_it_is, compute=ray.data.TaskPoolStrategy(size=1), num_cpus=0)
    dataset = alone.map(
        steps.read,
        fn_args=(context, attempts),
        # A limit that is not the pool's keeps Ray from fusing this step into the actors, where the model would wait.
        compute=ray.data.TaskPoolStrategy(size=len(units) + 1),
        num_cpus=1,
    ).map(
        cast(Any, steps.actor),
        fn_constructor_args=(context, attempts),
        compute=ray.data.ActorPoolStrategy(
            min_size=actors.min,
            max_size=most_actors,
            max_concurrent_calls_per_actor=EmbedActor.CALLS_AT_ONCE,
            enable_true_multi_threading=True,
        ),
        num_cpus=actors.cpus_per_actor,
        num_gpus=actors.gpus_per_actor,
    )
    try:
        for row in dataset.iter_rows():
            yield outcome_of(row)
    except (ray.exceptions.RayError, ExecutionTimeoutError) as error:
        raise explained(STAGE, error) from error


def _as_it_is(row: dict[str, Any]) -> dict[str, Any]:
    return row
