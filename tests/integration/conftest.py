"""Fixture of the integration tests: a real Ray on this machine, started once.

`ray_local` asks for `s3` first, since Ray's workers inherit the environment that Ray was started with.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from s3_server import S3Server


@pytest.fixture(scope="session")
def ray_local(s3: S3Server) -> Iterator[None]:
    """A local Ray with 4 logical CPUs, whatever the machine has; never joins a cluster that happens to run here."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=256 * 2**20,
        include_dashboard=False,
        logging_level=logging.WARNING,
    )
    yield
    ray.shutdown()
