"""How large a pool may be: a CPU stays free for reading, and nodes count that an autoscaler has yet to start."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from ullme_ray.embed.flow import STAGE
from ullme_ray.errors import EmbedError
from ullme_ray.ray_data import pool_limit
from ullme_ray.spec import load_job
from ullme_ray.spec.cluster import WorkerGroupSpec
from ullme_ray.spec.job import ActorsSpec

ACTORS = ActorsSpec(min=1, max=8, cpus_per_actor=3)


@pytest.fixture(autouse=True)
def one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": 1.0})


@pytest.mark.parametrize(
    ("groups", "most"),
    [
        ((), 1),
        ((WorkerGroupSpec(name="a", min=0, max=8, cpus=4),), 8),
        ((WorkerGroupSpec(name="a", min=0, max=2, cpus=4), WorkerGroupSpec(name="b", min=1, max=1, cpus=8)), 5),
        ((WorkerGroupSpec(name="a", min=8, max=8, cpus=4),), 1),  # no autoscaler: what is there is all there is
        ((WorkerGroupSpec(name="a", min=0, max=1, cpus=1),), 1),  # what is there counts in any case
    ],
)
def test_nodes_that_an_autoscaler_may_start_count(groups: tuple[WorkerGroupSpec, ...], most: int) -> None:
    assert pool_limit(STAGE, ACTORS, 100, groups) == most
    assert pool_limit(STAGE, ACTORS, 1, groups) == 1, "no more actors than units"


def test_the_nightly_job_begins_on_one_pod_and_may_grow_to_all_of_its_own() -> None:
    job = load_job(Path(__file__).parents[2] / "jobs" / "nightly.yaml")
    assert job.embed is not None
    assert pool_limit(STAGE, job.embed.actors, 100, job.cluster.groups_for("embed")) == job.embed.actors.max == 8
    assert [group.name for group in job.cluster.groups_for("embed")] == ["embed"]  # a serving pod's CPUs are not its own
    least = job.embed.actors.model_copy(update={"min": 4})
    assert pool_limit(STAGE, least, 100, job.cluster.groups_for("embed")) == 8
    with pytest.raises(EmbedError, match=r"embed.actors.min = 4 actors of 3 CPUs.* has 4; lower them or add nodes"):
        pool_limit(STAGE, least, 100)


def test_gpus_that_no_group_brings_are_refused() -> None:
    actors = ActorsSpec(min=2, max=2, cpus_per_actor=1, gpus_per_actor=1)
    groups = WorkerGroupSpec(name="a", min=0, max=4, cpus=4), WorkerGroupSpec(name="b", min=0, max=1, cpus=4, gpus=1)
    with pytest.raises(EmbedError, match=r"embed.actors.min = 2 actors of 1 GPUs are 2 GPUs, and this Ray cluster has 1;"):
        pool_limit(STAGE, actors, 100, groups)
