"""From a laptop to a cluster: Kubernetes manifests for KubeRay, and jobs submitted to a running Ray."""

from ullme_ray.deploy.render import render_job, write_manifests

__all__ = ["render_job", "write_manifests"]
