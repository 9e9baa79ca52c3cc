"""The process that listens: the HTTP side as a Ray Serve deployment, small and without torch."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle

from ullme_ray.serve.app import create_api
from ullme_ray.serve.backend import ReplicaBackend
from ullme_ray.spec.job import JobSpec


class Ingress:
    """Ray Serve's entry point; wrapped by `serve.ingress`, which asks it for the app once it exists."""

    def __init__(self, job: JobSpec, embedder: DeploymentHandle[Any]) -> None:
        assert job.serve is not None
        self._api = create_api(job.name, job.serve, ReplicaBackend(job.name, embedder))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._api
