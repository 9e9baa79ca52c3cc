"""What a job's own helpers do when another node of the cluster dies: nothing, for they live where the driver does."""

from __future__ import annotations

import json
import subprocess
import sys

SCRIPT = """
import json
import ray
from ray.cluster_utils import Cluster
from ullme_ray.embed.flow import STAGE
from ullme_ray.ray_data import Attempts

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=4)
ray.init(address=cluster.address, log_to_driver=False)
cluster.wait_for_nodes()
counters = [Attempts(STAGE, 3) for _ in range(5)]
where = [c._counts.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()) for c in counters]
print(json.dumps({"driver": ray.get_runtime_context().get_node_id(), "counters": ray.get(where), "nodes": len(ray.nodes())}))
ray.shutdown()
cluster.shutdown()
"""


def test_attempts_are_counted_on_the_driver_s_node() -> None:
    """A counter that dies with another node holds up every actor until Ray notices; Ray puts actors of no CPU anywhere."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["nodes"] == 2
    assert set(found["counters"]) == {found["driver"]}
