"""Starting ranks again: what a start that died has left must not stand in the way of the next."""

from __future__ import annotations

import time

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table

from ullme_ray.train.ranks import free_placement_groups, placement_groups

BUNDLES = [{"CPU": 1.0}, {"CPU": 1.0}]


@ray.remote(num_cpus=0)
class Controller:
    """As Ray Train's: an actor that makes the group, and dies without removing it."""

    def make(self) -> str:
        group: PlacementGroup = placement_group(BUNDLES, lifetime="detached", name=f"left {time.time_ns()}")
        ray.get(group.ready())
        return str(group.id.hex())


def states() -> dict[str, str]:
    return {id_: row["state"] for id_, row in placement_group_table().items()}


def test_groups_of_a_start_that_died_are_freed_and_no_others(ray_local: None) -> None:
    ours = placement_group([{"CPU": 1.0}])
    ray.get(ours.ready())
    others = placement_groups()
    assert ours.id.hex() in others
    controller = Controller.remote()
    left = ray.get(controller.make.remote())
    ray.kill(controller)
    assert placement_groups() - others == {left}

    waiting = placement_group([{"CPU": 4.0}])  # more than is free beside what was left
    assert not waiting.wait(1)
    free_placement_groups({left, waiting.id.hex()})
    again = placement_group(BUNDLES)
    assert again.wait(30)
    assert placement_groups() - others == {again.id.hex()}
    assert states()[ours.id.hex()] == "CREATED"
    free_placement_groups({again.id.hex(), ours.id.hex()})
