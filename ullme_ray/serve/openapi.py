"""The OpenAPI page. Bodies are parsed by hand, so it is written from the same forms, with the served models' limits in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from ullme_ray.serve.answers import OPENAI_ERROR_SCHEMA, TEI_ERROR_SCHEMA, Dialect
from ullme_ray.serve.schemas import ServedModel
from ullme_ray.spec.job import ServeSpec

# "x-limit" marks what depends on the served models; `openapi_page` puts the number in its place.
_TOKEN_ID = {"type": "integer", "minimum": 0, "x-limit": "token_id"}
_TEXT = {"type": "string", "minLength": 1}
IDS_SCHEMA: dict[str, Any] = {
    "oneOf": [
        {"type": "array", "minItems": 1, "items": _TOKEN_ID},
        {"type": "array", "minItems": 1, "x-limit": "inputs", "items": {"type": "array", "minItems": 1, "items": _TOKEN_ID}},
    ]
}
TEXTS_SCHEMA: dict[str, Any] = {"oneOf": [_TEXT, {"type": "array", "minItems": 1, "x-limit": "inputs", "items": _TEXT}]}
INPUT_SCHEMA: dict[str, Any] = {"oneOf": [*TEXTS_SCHEMA["oneOf"], *IDS_SCHEMA["oneOf"]]}
LIST_OF_TEXTS_SCHEMA: dict[str, Any] = {"minItems": 1, "x-limit": "inputs", "items": _TEXT}

_REASONS = {
    400: "The body is not what the API takes; the message names the field.",
    401: "No API key, or one that is not valid.",
    404: "No model is served under this name.",
    408: "The body did not arrive in time.",
    413: "The body, the number of inputs or of tokens is larger than allowed.",
    415: "The body is not plain JSON.",
    422: "A field has a wrong type or value.",
    424: "The model failed on this request.",
    429: "As many requests as can be queued, or more than the key's rate; see Retry-After.",
    500: "The server failed on this request.",
    503: "No model replica is available at the moment.",
    504: "Not done by the deadline.",
}


def json_body(form: type[BaseModel]) -> dict[str, Any]:
    """Arguments of a route that takes this form."""
    schema = form.model_json_schema()
    body = {"required": True, "content": {"application/json": {"schema": _inlined(schema, schema.pop("$defs", {}))}}}
    timeout = {
        "name": "x-timeout-ms",
        "in": "header",
        "required": False,
        "description": "Milliseconds that the request may take; the server's own limit is never exceeded.",
        "schema": {"type": "integer", "minimum": 1, "maximum": 999_999_999},
    }
    return {"openapi_extra": {"requestBody": body, "parameters": [timeout]}}


def json_response(schema: dict[str, Any], dialect: Dialect, *, media_type: str = "application/json") -> dict[str, Any]:
    """Arguments of a route that answers so, or with an error of this dialect."""
    error = TEI_ERROR_SCHEMA if dialect.flat else OPENAI_ERROR_SCHEMA
    answers: dict[int | str, dict[str, Any]] = {
        status: {"description": reason, "content": {"application/json": {"schema": error}}}
        for status, reason in _REASONS.items()
        if status not in ((500,) if dialect.flat else (422, 424))
    }
    answers[200] = {"description": "The answer.", "content": {media_type: {"schema": schema}}}
    return {"responses": answers, "response_model": None}


def openapi_page(api: FastAPI, names: Sequence[str], models: Sequence[ServedModel], settings: ServeSpec) -> dict[str, Any]:
    """The page, true for every one of the models that are known: of their limits the lowest.

    Args:
        names: all that are served.
        models: those of which something is known.
    """
    page = get_openapi(title=api.title, version=api.version, routes=api.routes, description=api.description)
    limits: dict[str, dict[str, Any]] = {"inputs": {"maxItems": settings.max_inputs}, "model": {"enum": list(names)}}
    if models:
        limits["token_id"] = {"maximum": min(model.vocab_size for model in models) - 1}
        limits["dimensions"] = {"maximum": min(model.dim for model in models)}
        limits["prompt"] = {"enum": sorted(set.intersection(*(set(model.prompts) for model in models)))}
    if settings.api_keys is not None:
        page.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        page["security"] = [{"key": []}]
        for path in ("/health", "/"):
            page["paths"].get(path, {}).get("get", {})["security"] = []
    result: dict[str, Any] = _limited(page, limits)
    return result


def _inlined(node: Any, definitions: dict[str, Any]) -> Any:
    """A schema without references into `$defs`, which would point nowhere once it is part of a page."""
    if isinstance(node, dict):
        if "$ref" in node:
            return _inlined(definitions[node["$ref"].rpartition("/")[2]], definitions)
        return {key: _inlined(value, definitions) for key, value in node.items()}
    return [_inlined(item, definitions) for item in node] if isinstance(node, list) else node


def _limited(node: Any, limits: dict[str, dict[str, Any]]) -> Any:
    if isinstance(node, dict):
        own = limits.get(node.get("x-limit", ""), {})
        return {key: _limited(value, limits) for key, value in node.items() if key != "x-limit"} | own
    return [_limited(item, limits) for item in node] if isinstance(node, list) else node
