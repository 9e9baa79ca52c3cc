"""The routes of Hugging Face's Text Embeddings Inference (TEI), with its fields and its flat errors.

As a TEI started with `--auto-truncate --default-prompt-name passage`: where a request names no prompt, texts are passages, so
that `/embed`, `/v1/embeddings` and the table agree. Beyond TEI: `model` picks one of several, `output_dtype` the numbers' type.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, WithJsonSchema

import ullme_ray
from ullme_ray.serve.answers import TEI
from ullme_ray.serve.limits import off_loop
from ullme_ray.serve.openapi import (
    IDS_SCHEMA,
    INPUT_SCHEMA,
    LIST_OF_TEXTS_SCHEMA,
    TEXTS_SCHEMA,
    json_body,
    json_response,
)
from ullme_ray.serve.parsing import bad, check_dimensions, check_inputs, parse_body, split_input
from ullme_ray.serve.quantising import OutputDtype, as_json, quantised
from ullme_ray.serve.schemas import DecodeCall, EmbedCall, InputRefusedError, ServedModel, TokenizeCall
from ullme_ray.serve.service import Service, refused

MAX_STATE_NUMBERS = 2**22  # of one /embed_all answer: tokens x width; some 45 MB of JSON
_TOKEN_BYTES = 80  # of one token in the JSON of a /tokenize answer, about

ModelName = Annotated[str | None, WithJsonSchema({"anyOf": [{"type": "string", "x-limit": "model"}, {"type": "null"}]})]
PromptName = Annotated[str | None, WithJsonSchema({"anyOf": [{"type": "string", "x-limit": "prompt"}, {"type": "null"}]})]
_Direction = Literal["right", "left", "Right", "Left"]


class _Form(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, hide_input_in_errors=True)


class _TextForm(_Form):
    """What the routes that run the model have in common."""

    model: ModelName = Field(None, description="A served model; the first by default.")
    prompt_name: PromptName = Field(None, description="Which prompt goes before texts; `passage` by default.")
    truncate: bool | None = Field(None, description="False refuses texts longer than the model takes; by default they are cut.")
    truncation_direction: _Direction | None = Field(None, description="The end that is cut off; right by default.")


class EmbedAllRequest(_TextForm):
    """Body of `POST /embed_all`."""

    inputs: Annotated[Any, Field(json_schema_extra=INPUT_SCHEMA)] = Field(
        description="A text, a list of texts, the token ids of one text, or a list of them. Token ids get no prompt."
    )


class EmbedRequest(EmbedAllRequest):
    """Body of `POST /embed`."""

    model_config = ConfigDict(
        json_schema_extra={
            "not": {
                "required": ["normalize", "output_dtype"],
                "properties": {"normalize": {"const": False}, "output_dtype": {"enum": ["int8", "uint8"]}},
            }
        }
    )

    normalize: bool | None = Field(None, description="Scale vectors to length 1, the default.")
    dimensions: Annotated[PositiveInt, Field(json_schema_extra={"x-limit": "dimensions"})] | None = Field(
        None, description="Cut vectors to this many dimensions."
    )
    output_dtype: OutputDtype | None = Field(None, description="Type of the numbers; binary packs 8 signs into a byte.")


class SimilarityInput(_Form):
    source_sentence: Annotated[str, Field(json_schema_extra={"minLength": 1})] = Field(
        description="The text that the others are compared with."
    )
    sentences: Annotated[list[str], Field(json_schema_extra=LIST_OF_TEXTS_SCHEMA)] = Field(description="The others.")


class SimilarityRequest(_Form):
    """Body of `POST /similarity`."""

    inputs: SimilarityInput
    parameters: _TextForm | None = None


class TokenizeRequest(_Form):
    """Body of `POST /tokenize`."""

    inputs: Annotated[Any, Field(json_schema_extra=TEXTS_SCHEMA)] = Field(description="A text, or a list of texts.")
    model: ModelName = Field(None, description="A served model; the first by default.")
    prompt_name: PromptName = Field(None, description="Which prompt goes before texts; `passage` by default.")
    add_special_tokens: bool | None = Field(None, description="Whether to add those of the model, the default.")


class DecodeRequest(_Form):
    """Body of `POST /decode`."""

    ids: Annotated[Any, Field(json_schema_extra=IDS_SCHEMA)] = Field(description="Token ids of one text, or a list of them.")
    model: ModelName = Field(None, description="A served model; the first by default.")
    skip_special_tokens: bool | None = Field(None, description="Whether to leave them out of the text, the default.")


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    max_inputs, max_tokens = service.settings.max_inputs, service.settings.max_request_tokens

    async def read(request: Request, raw: bytes, form: type[Any]) -> tuple[Any, ServedModel]:
        """The body as a form that has a `model`, and that model."""
        body: Any = await off_loop(lambda: parse_body(raw, form, TEI), size=len(raw))
        return body, await service.model(request, body.model)

    async def call_of(request: Request, raw: bytes, form: type[EmbedAllRequest]) -> tuple[Any, ServedModel, EmbedCall]:
        body, model = await read(request, raw, form)

        def make() -> EmbedCall:
            texts, token_ids = split_input(body.inputs, "inputs", TEI)
            check_inputs(texts, token_ids, model, "inputs", TEI, max_inputs=max_inputs)
            return _call(body, model, texts, token_ids, max_tokens)

        return body, model, await off_loop(make, size=len(raw))

    @routes.post("/", include_in_schema=False)
    @routes.post("/embed", **json_body(EmbedRequest), **json_response(_VECTORS_SCHEMA, TEI))
    async def embed(request: Request) -> Response:
        async with service.admitted(request) as raw:
            body, model, call = await call_of(request, raw, EmbedRequest)
            check_dimensions(body.dimensions, model, TEI)
            normalize = body.normalize is not False
            if not normalize and body.output_dtype in ("int8", "uint8"):
                raise bad("output_dtype", "int8 and uint8 are made of vectors of length 1 only; leave normalize true", TEI)
            call = replace(call, dimensions=body.dimensions, normalize=normalize)
            reply = await service.embed(request, call, "inputs", TEI)
            assert not isinstance(reply.vectors, list)
            vectors = reply.vectors
            answer = await off_loop(
                lambda: _json_list(as_json(quantised(vectors, body.output_dtype or "float32"))), size=reply.num_bytes
            )
        return Response(answer, media_type="application/json", headers=service.headers(reply))

    @routes.post("/embed_all", **json_body(EmbedAllRequest), **json_response(_STATES_SCHEMA, TEI))
    async def embed_all(request: Request) -> Response:
        async with service.admitted(request) as raw:
            _, model, call = await call_of(request, raw, EmbedAllRequest)
            most = min(max_tokens, MAX_STATE_NUMBERS // model.dim)
            reply = await service.embed(
                request, replace(call, pool=False, normalize=False, max_request_tokens=most), "inputs", TEI
            )
            answer = await off_loop(
                lambda: _json_list([_json_list(as_json(states)).decode() for states in reply.vectors]), size=reply.num_bytes
            )
        return Response(answer, media_type="application/json", headers=service.headers(reply))

    @routes.post("/similarity", **json_body(SimilarityRequest), **json_response(_NUMBERS_SCHEMA, TEI))
    async def similarity(request: Request) -> Response:
        async with service.admitted(request) as raw:
            body = await off_loop(lambda: parse_body(raw, SimilarityRequest, TEI), size=len(raw))
            form = body.parameters or _TextForm()
            model = await service.model(request, form.model)

            def make() -> EmbedCall:
                texts = [body.inputs.source_sentence, *body.inputs.sentences]
                if not body.inputs.sentences:
                    raise bad("inputs.sentences", "the list is empty; give at least one text", TEI, code="empty", status=400)
                check_inputs(texts, None, model, "inputs", TEI, max_inputs=max_inputs + 1)
                return _call(form, model, texts, None, max_tokens)

            reply = await service.embed(request, await off_loop(make, size=len(raw)), "inputs", TEI)
            vectors = np.asarray(reply.vectors)
            (answer,) = as_json((vectors[1:] @ vectors[0])[None])
        return Response(answer, media_type="application/json", headers=service.headers(reply))

    @routes.post("/tokenize", **json_body(TokenizeRequest), **json_response(_TOKENS_SCHEMA, TEI))
    async def tokenize(request: Request) -> Response:
        async with service.admitted(request) as raw:
            body, model = await read(request, raw, TokenizeRequest)

            def make() -> TokenizeCall:
                texts, _ = split_input(body.inputs, "inputs", TEI)
                if texts is None:
                    raise bad("inputs", "give a string, or a list of strings", TEI)
                check_inputs(texts, None, model, "inputs", TEI, max_inputs=max_inputs)
                prompt, with_special = _prompt(body.prompt_name, model), body.add_special_tokens is not False
                return TokenizeCall(model.name, texts, prompt, with_special, max_request_tokens=max_tokens)

            call = await off_loop(make, size=len(raw))
            try:
                reply = await service.before_deadline(request, lambda _: service.backend.tokenize(call))
            except InputRefusedError as error:
                raise refused(error, "inputs", TEI) from None
            answer = await off_loop(
                lambda: json.dumps([[asdict(token) for token in tokens] for tokens in reply.tokens]).encode(),
                size=_TOKEN_BYTES * sum(map(len, reply.tokens)),
            )
        return Response(answer, media_type="application/json")

    @routes.post("/decode", **json_body(DecodeRequest), **json_response(_TEXTS_SCHEMA, TEI))
    async def decode(request: Request) -> Response:
        async with service.admitted(request) as raw:
            body, model = await read(request, raw, DecodeRequest)

            def make() -> DecodeCall:
                _, token_ids = split_input(body.ids, "ids", TEI)
                if token_ids is None:
                    raise bad("ids", "give a list of token ids, or a list of lists of them", TEI)
                check_inputs(None, token_ids, model, "ids", TEI, max_inputs=max_inputs)
                if (num_tokens := sum(map(len, token_ids))) > max_tokens:
                    raise refused(InputRefusedError("too_many_tokens", 0, num_tokens, max_tokens), "ids", TEI)
                return DecodeCall(model.name, token_ids, body.skip_special_tokens is not False)

            call = await off_loop(make, size=len(raw))
            texts = await service.before_deadline(request, lambda _: service.backend.decode(call))
            answer = await off_loop(lambda: json.dumps(texts).encode(), size=sum(map(len, texts)))
        return Response(answer, media_type="application/json")

    @routes.get("/info", **json_response(_INFO_SCHEMA, TEI))
    async def info(request: Request) -> Any:
        """TEI's fields, and beside them what the replica says of the default model."""
        model = await service.model(request, None)
        settings = service.settings
        return {
            "model_id": model.name,
            "model_sha": model.fingerprint,
            "model_dtype": model.dtype,
            "model_type": {"embedding": {"pooling": model.pooling}},
            "max_concurrent_requests": settings.max_queued_requests,
            "max_input_length": model.max_tokens,
            "max_batch_tokens": model.tokens_per_batch,
            "max_batch_requests": None,
            "max_client_batch_size": settings.max_inputs,
            "auto_truncate": True,
            "tokenization_workers": 1,
            "version": ullme_ray.__version__,
            "sha": None,
            "docker_label": None,
            "models": service.names,
            **asdict(model),
        }

    @routes.get("/health", **json_response({"type": "object"}, TEI))
    async def health(request: Request) -> Any:
        """200 once a replica has loaded the model and computed the export's own vectors; 503 before."""
        await service.check_health(request)
        return {"status": "ok"}

    return routes


def _call(
    form: _TextForm, model: ServedModel, texts: list[str] | None, token_ids: list[list[int]] | None, max_tokens: int
) -> EmbedCall:
    return EmbedCall(
        model.name,
        texts,
        token_ids,
        prompt=_prompt(form.prompt_name, model),
        truncate=form.truncate is not False,
        truncation_direction="left" if (form.truncation_direction or "").lower() == "left" else "right",
        max_request_tokens=max_tokens,
    )


def _prompt(name: str | None, model: ServedModel) -> str:
    if name is not None and name not in model.prompts:
        raise bad("prompt_name", f"the model has no prompt of this name; it has {', '.join(model.prompts)}", TEI)
    return name or "passage"


def _json_list(items: list[str]) -> bytes:
    return f"[{','.join(items)}]".encode()


_NUMBERS_SCHEMA: dict[str, Any] = {"type": "array", "items": {"type": "number"}}
_VECTORS_SCHEMA: dict[str, Any] = {"type": "array", "items": _NUMBERS_SCHEMA}
_STATES_SCHEMA: dict[str, Any] = {"type": "array", "items": _VECTORS_SCHEMA}
_TEXTS_SCHEMA: dict[str, Any] = {"type": "array", "items": {"type": "string"}}
_INFO_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["model_id", "model_sha", "model_dtype", "model_type", "max_input_length", "version", "models"],
    "properties": {
        "model_id": {"type": "string"},
        "model_type": {"type": "object", "required": ["embedding"]},
        "max_input_length": {"type": "integer"},
        "models": _TEXTS_SCHEMA,
    },
}
_TOKENS_SCHEMA: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "array",
        "items": {
            "type": "object",
            "required": ["id", "text", "special", "start", "stop"],
            "properties": {
                "id": {"type": "integer"},
                "text": {"type": "string"},
                "special": {"type": "boolean"},
                "start": {"type": ["integer", "null"]},
                "stop": {"type": ["integer", "null"]},
            },
        },
    },
}
