"""OpenAI's embeddings API: `POST /v1/embeddings`, `GET /v1/models`. Fields beyond it have defaults that its clients expect."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from ullme_ray.serve.answers import OPENAI
from ullme_ray.serve.limits import off_loop
from ullme_ray.serve.openapi import INPUT_SCHEMA, json_body, json_response
from ullme_ray.serve.parsing import bad, check_dimensions, check_inputs, parse_body, split_input
from ullme_ray.serve.quantising import OutputDtype, as_base64, as_json, quantised
from ullme_ray.serve.schemas import EmbedCall, EmbedReply, ServedModel
from ullme_ray.serve.service import Service

_NO_FLOATS = ("int8", "uint8", "binary", "ubinary")  # not as base64: openai's client asks for it unasked, and reads float32


class EmbeddingRequest(BaseModel):
    """Body of `POST /v1/embeddings`."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        hide_input_in_errors=True,
        json_schema_extra={
            "not": {
                "required": ["encoding_format", "output_dtype"],
                "properties": {"encoding_format": {"const": "base64"}, "output_dtype": {"enum": list(_NO_FLOATS)}},
            }
        },
    )

    input: Annotated[Any, Field(json_schema_extra=INPUT_SCHEMA)] = Field(
        description="A text, a list of texts, the token ids of one text, or a list of them. Token ids get no prompt."
    )
    model: Annotated[str, Field(json_schema_extra={"x-limit": "model"})] = Field(
        description="Name of the served model, as listed by /v1/models."
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="Vectors as lists of numbers (default), or as base64 of little-endian float32."
    )
    dimensions: Annotated[PositiveInt, Field(json_schema_extra={"x-limit": "dimensions"})] | None = Field(
        None, description="Cut vectors to this many dimensions and scale to length 1."
    )
    user: str | None = Field(None, description="Accepted for compatibility; not used.")
    input_type: Literal["query", "passage"] | None = Field(
        None, description="Which of the job's prompts goes before the texts; passage by default. Not in OpenAI's API."
    )
    output_dtype: OutputDtype | None = Field(
        None, description="Type of the numbers; float32 by default, binary packs 8 signs into a byte. Not in OpenAI's API."
    )
    truncate: bool | None = Field(
        None, description="False refuses texts longer than the model takes; by default they are cut. Not in OpenAI's API."
    )


def to_call(request: EmbeddingRequest, model: ServedModel, *, max_inputs: int, max_tokens: int) -> EmbedCall:
    """Checks a request against the served model.

    Raises:
        ApiError: 400 for input or dimensions that this model cannot take.
    """
    check_dimensions(request.dimensions, model, OPENAI)
    if request.encoding_format == "base64" and request.output_dtype in _NO_FLOATS:
        message = f'base64 holds float32, and {request.output_dtype} is asked for; ask for encoding_format "float" with it'
        raise bad("encoding_format", message, OPENAI)
    texts, token_ids = split_input(request.input, "input", OPENAI)
    check_inputs(texts, token_ids, model, "input", OPENAI, max_inputs=max_inputs)
    prompt = request.input_type or "passage"
    if prompt not in model.prompts:
        raise bad("input_type", f"the model has no prompt of this name; it has {', '.join(model.prompts)}", OPENAI)
    return EmbedCall(
        model.name,
        texts,
        token_ids,
        prompt=prompt,
        dimensions=request.dimensions,
        truncate=request.truncate is not False,
        max_request_tokens=max_tokens,
    )


def embedding_answer(reply: EmbedReply, request: EmbeddingRequest, model: str) -> bytes:
    """The JSON of a successful `POST /v1/embeddings`."""
    numbers = quantised(np_rows(reply), request.output_dtype or "float32")
    rows = as_base64(numbers) if request.encoding_format == "base64" else as_json(numbers)
    data = ",".join(f'{{"object":"embedding","index":{index},"embedding":{row}}}' for index, row in enumerate(rows))
    num_tokens = sum(reply.num_tokens)
    usage = json.dumps({"prompt_tokens": num_tokens, "total_tokens": num_tokens})
    return f'{{"object":"list","data":[{data}],"model":{json.dumps(model)},"usage":{usage}}}'.encode()


def np_rows(reply: EmbedReply) -> Any:
    assert not isinstance(reply.vectors, list), "a pooled call has one vector for each text"
    return reply.vectors


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/embeddings", **json_body(EmbeddingRequest), **json_response(_ANSWER_SCHEMA, OPENAI))
    async def embeddings(request: Request) -> Response:
        async with service.admitted(request) as raw:

            def check() -> EmbeddingRequest:
                return parse_body(raw, EmbeddingRequest, OPENAI)

            body = await off_loop(check, size=len(raw))
            model = await service.model(request, body.model)
            make: Callable[[], EmbedCall] = lambda: to_call(  # noqa: E731 - it may run in a thread
                body, model, max_inputs=service.settings.max_inputs, max_tokens=service.settings.max_request_tokens
            )
            call = await off_loop(make, size=len(raw))
            reply = await service.embed(request, call, "input", OPENAI)
            answer = await off_loop(lambda: embedding_answer(reply, body, model.name), size=reply.num_bytes)
        return Response(answer, media_type="application/json", headers=service.headers(reply))

    @routes.get("/v1/models", **json_response(_MODELS_SCHEMA, OPENAI))
    async def models() -> Any:
        return {"object": "list", "data": [_listed(model, service) for model in service.names]}

    @routes.get(
        "/v1/models/{model}",
        openapi_extra={
            "parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}]
        },
        **json_response(_MODEL_SCHEMA, OPENAI),
    )
    async def one_model(request: Request) -> Any:
        return _listed(service.known_name(request.path_params["model"]), service)

    return routes


def _listed(name: str, service: Service) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": service.started, "owned_by": "ullme_ray"}


_MODEL_SCHEMA = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
    },
}
_MODELS_SCHEMA = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": _MODEL_SCHEMA}},
}
_ANSWER_SCHEMA = {
    "type": "object",
    "required": ["object", "data", "model", "usage"],
    "properties": {
        "object": {"const": "list"},
        "model": {"type": "string"},
        "data": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["object", "index", "embedding"],
                "properties": {
                    "object": {"const": "embedding"},
                    "index": {"type": "integer", "minimum": 0},
                    "embedding": {"oneOf": [{"type": "array", "items": {"type": "number"}}, {"type": "string"}]},
                },
            },
        },
        "usage": {
            "type": "object",
            "required": ["prompt_tokens", "total_tokens"],
            "properties": {
                "prompt_tokens": {"type": "integer", "minimum": 0},
                "total_tokens": {"type": "integer", "minimum": 0},
            },
        },
    },
}
