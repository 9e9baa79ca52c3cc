"""Unit tests see no Ray: in a run of all tests, the integration tests' one is shut down before the first of them."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(scope="session", autouse=True)
def no_ray() -> None:
    if "ray" in sys.modules:
        import ray

        ray.shutdown()
