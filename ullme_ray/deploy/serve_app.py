"""What a RayService names as its application: Ray Serve imports this module in the cluster and calls `application`."""

from __future__ import annotations

from ray.serve import Application

from ullme_ray import logs
from ullme_ray.runtime import quiet_libraries
from ullme_ray.serve.launch import build_app
from ullme_ray.spec import absolute_paths, load_job


def application(args: dict[str, str]) -> Application:
    """The server of the job file at `args["job"]`."""
    quiet_libraries()
    job = absolute_paths(load_job(args["job"]))
    logs.set_up(job=job.name)
    return build_app(job)
