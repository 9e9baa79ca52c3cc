"""The status page at `/`: one file without any other, that asks this server as every client does."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Response

from ullme_ray.serve.answers import TEI
from ullme_ray.serve.metrics import Metrics
from ullme_ray.serve.openapi import json_response
from ullme_ray.serve.schemas import ApiError
from ullme_ray.serve.service import Service


def router(service: Service, metrics: Metrics) -> APIRouter:
    routes = APIRouter()
    html = files("ullme_ray.serve").joinpath("page.html").read_text(encoding="utf-8")
    headers = {"content-security-policy": _policy(html), "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}

    async def load() -> dict[str, dict[str, float]]:
        try:
            return await service.backend.load()
        except ApiError:  # without replicas there is still something to show
            return {}

    @routes.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(html, media_type="text/html; charset=utf-8", headers=headers)

    @routes.get("/load", **json_response(_LOAD_SCHEMA, TEI))
    async def numbers() -> Any:
        """The served models as far as they can be asked without waking one, and how busy all are."""
        models = [asdict(model) for model in await service.described()]
        inside = {"requests": service.admission.num_requests, "max_requests": service.settings.max_queued_requests}
        return {"models": models, "load": {**inside, "models": await load()}}

    @routes.get("/metrics", **json_response({"type": "string"}, TEI, media_type="text/plain"))
    async def prometheus() -> Response:
        content = metrics.page(service.admission.num_requests, await load())
        return Response(content, media_type="text/plain; version=0.0.4; charset=utf-8")

    return routes


def _policy(html: str) -> str:
    """Only this page's own script and style run, and they talk to this server alone."""

    def digest(tag: str) -> str:
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()

    script, style = digest("script"), digest("style")
    return (
        f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


_LOAD_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["models", "load"],
    "properties": {
        "models": {"type": "array", "items": {"type": "object", "required": ["name", "fingerprint", "dim", "max_tokens"]}},
        "load": {"type": "object", "required": ["requests", "max_requests", "models"]},
    },
}
