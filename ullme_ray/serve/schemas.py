"""What goes over the wire: the OpenAI embeddings API as types, checks and errors. No torch, no ray."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

_INPUT_SCHEMA = {
    "oneOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
        {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
        {"type": "array", "minItems": 1, "items": {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}},
    ]
}


class ApiError(Exception):
    """An answer other than success, in OpenAI's form."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class ServedModel:
    """The model behind the server, as its replica describes it."""

    name: str
    fingerprint: str
    dim: int
    max_tokens: int
    vocab_size: int
    pooling: str
    dtype: str
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EmbedCall:
    """What the ingress asks of a model replica: texts with the prompt they get, or token ids taken as they are."""

    texts: list[str] | None
    token_ids: list[list[int]] | None
    prompt: Literal["query", "passage"]
    dimensions: int | None


@dataclass(frozen=True)
class EmbedReply:
    vectors: np.ndarray  # (N, D) float32, unit length
    num_tokens: int
    num_truncated: int


class EmbeddingRequest(BaseModel):
    """Body of `POST /v1/embeddings`."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    input: Annotated[Any, Field(json_schema_extra=_INPUT_SCHEMA)] = Field(
        description="A text, a list of texts, the token ids of one text, or a list of them. Token ids get no prompt."
    )
    model: str = Field(description="Name of the served model, as listed by /v1/models.")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="Vectors as lists of numbers (default), or as base64 of little-endian float32."
    )
    dimensions: PositiveInt | None = Field(None, description="Cut vectors to this many dimensions and scale to length 1.")
    user: str | None = Field(None, description="Accepted for compatibility; not used.")
    input_type: Literal["query", "passage"] | None = Field(
        None, description="Which of the job's prompts goes before the texts; passage by default."
    )


def parse_body(raw: bytes) -> EmbeddingRequest:
    """A request body whose fields have the right types.

    Raises:
        ApiError: 400, naming the field at fault.
    """
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise ApiError(400, "the request body is not valid JSON in UTF-8") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the request body must be a JSON object")
    for key in body:
        if key not in EmbeddingRequest.model_fields:
            raise ApiError(400, f"unrecognized request argument supplied: {_shortened(key)}")
    try:
        return EmbeddingRequest.model_validate(body)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_input=False)[0]
        name = str(detail["loc"][0])
        if detail["type"] == "missing":
            raise ApiError(400, f"you must provide a {name} parameter", param=name) from None
        raise ApiError(400, f"invalid {name}: {detail['msg']}", param=name) from None


def to_call(request: EmbeddingRequest, model: ServedModel, *, max_inputs: int) -> EmbedCall:
    """Checks a request against the served model.

    Raises:
        ApiError: 404 for another model's name, 400 for input or dimensions that this model cannot take.
    """
    if request.model != model.name:
        raise ApiError(
            404,
            f"the model {_shortened(request.model)!r} does not exist; this server has {model.name!r}",
            param="model",
            code="model_not_found",
        )
    if request.dimensions is not None and request.dimensions > model.dim:
        raise _bad("dimensions", f"the model has {model.dim} dimensions; ask for at most as many")
    texts, token_ids = _split_input(request.input)
    inputs: list[Any] = texts if texts is not None else token_ids or []
    if not inputs:
        raise _bad("input", "the list is empty; give at least one text")
    if len(inputs) > max_inputs:
        raise _bad("input", f"{len(inputs)} inputs in one request; send at most {max_inputs}")
    if texts is not None:
        _check_texts(texts)
    else:
        _check_token_ids(inputs, model.vocab_size)
    return EmbedCall(texts, token_ids, request.input_type or "passage", request.dimensions)


def _split_input(value: Any) -> tuple[list[str] | None, list[list[int]] | None]:
    """Texts or token ids, whichever of OpenAI's four forms `input` has."""
    if isinstance(value, str):
        return [value], None
    if isinstance(value, list):
        kinds = {type(item) for item in value}  # exact types: bool is an int to isinstance
        if kinds <= {str}:
            return value, None
        if kinds == {int}:
            return None, [value]
        if kinds == {list} and all(type(token) is int for item in value for token in item):
            return None, value
    raise _bad("input", "give a string, a list of strings, a list of token ids, or a list of lists of token ids")


def _check_texts(texts: list[str]) -> None:
    for position, text in enumerate(texts):
        if not text:
            raise _bad("input", f"text {position} is empty")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise _bad("input", f"text {position} holds half a surrogate pair, which is no character") from None


def _check_token_ids(rows: list[list[int]], vocab_size: int) -> None:
    for position, ids in enumerate(rows):
        if not ids:
            raise _bad("input", f"token list {position} is empty")
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise _bad("input", f"token list {position} has an id outside the model's vocabulary, 0 to {vocab_size - 1}")


def embedding_answer(reply: EmbedReply, *, model: str, encoding_format: Literal["float", "base64"] | None) -> bytes:
    """The JSON of a successful `POST /v1/embeddings`. Floats have the fewest digits that give the same float32 back."""
    if encoding_format == "base64":
        rows = [f'"{base64.b64encode(row.tobytes()).decode()}"' for row in reply.vectors.astype("<f4")]
    else:
        rows = [f"[{','.join(row.astype(str).tolist())}]" for row in reply.vectors]
    data = ",".join(f'{{"object":"embedding","index":{index},"embedding":{row}}}' for index, row in enumerate(rows))
    usage = json.dumps({"prompt_tokens": reply.num_tokens, "total_tokens": reply.num_tokens})
    return f'{{"object":"list","data":[{data}],"model":{json.dumps(model)},"usage":{usage}}}'.encode()


def _bad(param: str, message: str) -> ApiError:
    return ApiError(400, f"invalid {param}: {message}", param=param)


def _shortened(text: str, limit: int = 60) -> str:
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair could not be sent back
    return text if len(text) <= limit else text[:limit] + "..."


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
