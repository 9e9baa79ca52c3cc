"""The one number of Ray: pyproject, images and `rayVersion` all have this one, and a test holds them to it."""

from __future__ import annotations

from ullme_ray import __version__
from ullme_ray.spec.job import JobSpec

RAY_VERSION = "2.60.0"


def image(job: JobSpec, *, gpus: bool) -> str:
    """The job's image, or the names under which cluster/README.md builds them."""
    return job.cluster.image or f"ullme-ray:{__version__}{'-cuda' if gpus else ''}"
