"""The HTTP side put together: a small process without torch that checks, limits and forwards requests.

    client -> Observed (id, log, metrics) -> RequireKey (key, rate) -> RefuseOverload -> route (openai_api, tei_api, page)
    -> Service -> Backend

It is apart from the model so that a model replica's death cuts no connection.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

import ullme_ray
from ullme_ray.serve import openai_api, page, tei_api
from ullme_ray.serve.access import Observed, Record, RequireKey, access_log
from ullme_ray.serve.answers import json_error
from ullme_ray.serve.keys import KeyRing, RateLimit
from ullme_ray.serve.limits import RefuseOverload
from ullme_ray.serve.metrics import Metrics
from ullme_ray.serve.openapi import openapi_page
from ullme_ray.serve.schemas import ApiError, Backend
from ullme_ray.serve.service import Service
from ullme_ray.spec.job import ServeSpec

ABOUT = "Embeddings by OpenAI's API (`/v1`) and that of Text Embeddings Inference (the other routes)."


def create_api(name: str, settings: ServeSpec, backend: Backend) -> FastAPI:
    """The routes over a backend. `name` is the job's.

    Raises:
        UllmeError: the API keys cannot be read.
    """
    api = FastAPI(
        title=f"Embeddings of {name}",
        description=ABOUT,
        version=ullme_ray.__version__,
        openapi_url=None,  # it needs the served models, so it is a route of its own
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    service, metrics = Service(settings, backend), Metrics()

    def finished(record: Record) -> None:
        metrics.add(record)
        if settings.access_log:
            access_log.info(record.to_json())

    rate = RateLimit(settings.requests_per_minute) if settings.requests_per_minute else None
    routers = (openai_api.router(service), tei_api.router(service), page.router(service, metrics))
    routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    posts = {route.path for route in routes if "POST" in (route.methods or ())}
    api.add_middleware(RefuseOverload, admission=service.admission, paths=posts)
    api.add_middleware(RequireKey, keys=KeyRing(settings.api_keys), rate=rate)
    api.add_middleware(Observed, finished=finished)
    api.add_exception_handler(ApiError, _answer_api_error)
    api.add_exception_handler(HTTPException, _answer_http_error)
    for router in routers:
        api.include_router(router)

    @api.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Any:
        return openapi_page(api, service.names, await service.described(), settings)

    return api


async def _answer_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return json_error(error, request.url.path)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {404: "there is no such route", 405: "this route has no such method"}.get(error.status_code, str(error.detail))
    return json_error(ApiError(error.status_code, message, headers=dict(error.headers or {})), request.url.path)
