"""Errors as JSON, in the form of the API whose route was asked: OpenAI's nested one, or the flat one of TEI."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse

from ullme_ray.serve.schemas import ApiError

TEI_ROUTES = ("/", "/embed", "/embed_all", "/similarity", "/tokenize", "/decode", "/info", "/health", "/metrics", "/load")


@dataclass(frozen=True)
class Dialect:
    """The status codes in which the two APIs differ."""

    invalid: int  # a field of the wrong type or value
    too_much: int  # more inputs or tokens than allowed
    failed: int  # the model failed on a good request
    flat: bool

    def body(self, error: ApiError) -> dict[str, Any]:
        if self.flat:
            return {"error": error.message, "error_type": _error_type(error)}
        return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}}


OPENAI = Dialect(invalid=400, too_much=400, failed=500, flat=False)
TEI = Dialect(invalid=422, too_much=413, failed=424, flat=True)


def dialect_of(path: str) -> Dialect:
    return TEI if path in TEI_ROUTES else OPENAI


def json_error(error: ApiError, path: str) -> JSONResponse:
    return JSONResponse(dialect_of(path).body(error), status_code=error.status, headers=error.headers)


def _error_type(error: ApiError) -> str:
    if error.code == "empty":
        return "Empty"
    return {401: "Unauthorized", 422: "Validation", 429: "Overloaded", 503: "Unhealthy", 504: "Unhealthy"}.get(
        error.status, "Backend" if error.status in (424, 500) else "Validation"
    )


OPENAI_ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
TEI_ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error", "error_type"],
    "properties": {
        "error": {"type": "string"},
        "error_type": {
            "type": "string",
            "enum": ["Empty", "Validation", "Unauthorized", "Overloaded", "Unhealthy", "Backend"],
        },
    },
}
