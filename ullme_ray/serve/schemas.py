"""What goes over the wire: the OpenAI embeddings API as types, checks and errors. No torch, no ray."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

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


class InputRefusedError(Exception):
    """Input that only the tokenizer can judge: the replica raises it, the HTTP side answers in the form of the route's API.

    Args:
        reason: too_long (text `position` has more than `limit` tokens, and `truncate` is false) or too_many_tokens (all
            texts together; `position` is 0).
        num_tokens: how many there are.
    """

    def __init__(self, reason: Literal["too_long", "too_many_tokens"], position: int, num_tokens: int, limit: int) -> None:
        super().__init__(reason, position, num_tokens, limit)
        self.reason, self.position, self.num_tokens, self.limit = reason, position, num_tokens, limit

    def __str__(self) -> str:
        if self.reason == "too_many_tokens":
            return f"the texts have {self.num_tokens} tokens together; send at most {self.limit} in one request"
        given = f"text {self.position} has {self.num_tokens} tokens, and the model takes {self.limit}"
        return f"{given}; shorten it or allow truncation"


@dataclass(frozen=True)
class ServedModel:
    """One served model, as its replica describes it."""

    name: str
    fingerprint: str
    dim: int
    max_tokens: int  # of one text, prompt and special tokens included
    vocab_size: int
    pooling: str
    dtype: str
    prompts: dict[str, str] = field(default_factory=lambda: {"query": "", "passage": ""})  # name -> text
    created: int = 0  # seconds since 1970; when the replica loaded it
    parent: str | None = None  # of an adapter: the served name of its backbone
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EmbedCall:
    """What the ingress asks of a model replica: texts with the prompt they get, or token ids taken as they are."""

    model: str  # a served name
    texts: list[str] | None
    token_ids: list[list[int]] | None = None
    prompt: str = "passage"  # a name out of ServedModel.prompts
    dimensions: int | None = None  # cut, then normalised again where `normalize` says so
    normalize: bool = True  # False: the pooled state as it is
    truncate: bool = True  # False: InputRefusedError where a text is longer than max_tokens
    truncation_direction: Literal["right", "left"] = "right"  # the end that is cut off
    pool: bool = True  # False: the states of all tokens
    max_request_tokens: int | None = None  # after truncation, over all texts; beyond it InputRefusedError
    deadline_s: float | None = None  # seconds from now; later than that nobody waits for the answer


@dataclass(frozen=True)
class EmbedReply:
    vectors: np.ndarray | list[np.ndarray]  # (N, D) float32; without pooling N times (L, D), prompt tokens included
    num_tokens: list[int]  # of each input, prompt included, after truncation
    num_truncated: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # of this request: tokenization, queue, inference
    fingerprint: str = ""  # of the model that made them


@dataclass(frozen=True)
class TokenizeCall:
    model: str
    texts: list[str]
    prompt: str = "passage"
    add_special_tokens: bool = True


@dataclass(frozen=True)
class Token:
    """One token of a text; start and stop count characters of prompt + text, and are None for special tokens."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


@dataclass(frozen=True)
class TokenizeReply:
    tokens: list[list[Token]]  # of each text; never truncated


@dataclass(frozen=True)
class DecodeCall:
    model: str
    token_ids: list[list[int]]
    skip_special_tokens: bool = True


class Backend(Protocol):
    """Where vectors come from. Every method raises ApiError where no replica can answer (503) or all are full (429)."""

    def models(self) -> list[str]:
        """The served names, the default one first."""
        ...

    async def describe(self, model: str) -> ServedModel: ...

    async def embed(self, call: EmbedCall) -> EmbedReply:
        """Cancelling it drops the work. Raises InputRefusedError as the call asks for it."""
        ...

    async def tokenize(self, call: TokenizeCall) -> TokenizeReply: ...

    async def decode(self, call: DecodeCall) -> list[str]: ...

    async def load(self) -> dict[str, dict[str, float]]:
        """For each served name what is known of its replicas, summed over them, for /metrics and the status page.

        Keys, each of which may be absent: replicas, queue_requests, queue_tokens (now); batches, batch_rows, batch_tokens,
        padded_tokens, inference_seconds (since the start).
        """
        ...


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
    return EmbedCall(model.name, texts, token_ids, prompt=request.input_type or "passage", dimensions=request.dimensions)


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
        rows = [f'"{base64.b64encode(row.tobytes()).decode()}"' for row in np.asarray(reply.vectors, "<f4")]
    else:
        rows = [f"[{','.join(row.astype(str).tolist())}]" for row in reply.vectors]
    data = ",".join(f'{{"object":"embedding","index":{index},"embedding":{row}}}' for index, row in enumerate(rows))
    num_tokens = sum(reply.num_tokens)
    usage = json.dumps({"prompt_tokens": num_tokens, "total_tokens": num_tokens})
    return f'{{"object":"list","data":[{data}],"model":{json.dumps(model)},"usage":{usage}}}'.encode()


def _bad(param: str, message: str) -> ApiError:
    return ApiError(400, f"invalid {param}: {message}", param=param)


def _shortened(text: str, limit: int = 60) -> str:
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair could not be sent back
    return text if len(text) <= limit else text[:limit] + "..."


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
