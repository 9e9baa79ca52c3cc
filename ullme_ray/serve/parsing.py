"""Bytes of a request body -> checked values. What is wrong is told by field and number; the value itself is never repeated."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ullme_ray.serve.answers import Dialect
from ullme_ray.serve.schemas import ApiError, ServedModel

Body = TypeVar("Body", bound=BaseModel)


def parse_body(raw: bytes, form: type[Body], dialect: Dialect) -> Body:
    """A body whose fields have the right types.

    Raises:
        ApiError: 400 for what is no JSON, else the dialect's code, naming the field at fault.
    """
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_number)
    except (ValueError, RecursionError):
        raise ApiError(400, "the request body is not valid JSON in UTF-8") from None
    if not isinstance(body, dict):
        raise ApiError(dialect.invalid, "the request body must be a JSON object")
    if form.model_config.get("extra") == "forbid":
        for key in body:
            if key not in form.model_fields:
                raise ApiError(dialect.invalid, f"unrecognized request argument supplied: {shortened(key)}")
    try:
        return form.model_validate(body)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in detail["loc"] if isinstance(part, int) or part in _field_names(form))
        if detail["type"] == "missing":
            raise ApiError(dialect.invalid, f"you must provide a {name} parameter", param=name) from None
        raise bad(name, detail["msg"], dialect) from None


def bad(param: str, message: str, dialect: Dialect, *, code: str | None = None, status: int | None = None) -> ApiError:
    return ApiError(status or dialect.invalid, f"invalid {param}: {message}", param=param, code=code)


def split_input(value: Any, param: str, dialect: Dialect) -> tuple[list[str] | None, list[list[int]] | None]:
    """Texts or token ids, whichever of the four forms the field has.

    Raises:
        ApiError: it has none of them.
    """
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
    raise bad(param, "give a string, a list of strings, a list of token ids, or a list of lists of token ids", dialect)


def check_inputs(
    texts: list[str] | None,
    token_ids: list[list[int]] | None,
    model: ServedModel,
    param: str,
    dialect: Dialect,
    *,
    max_inputs: int,
) -> None:
    """Raises ApiError where there is no input, too much of it, an empty one, or one that the model has no token for."""
    inputs: list[Any] = texts if texts is not None else token_ids or []
    if not inputs:
        raise bad(param, "the list is empty; give at least one text", dialect, code="empty", status=400)
    if len(inputs) > max_inputs:
        message = f"{len(inputs)} inputs in one request; send at most {max_inputs}"
        raise bad(param, message, dialect, status=dialect.too_much)
    if texts is not None:
        check_texts(texts, param, dialect)
    for position, ids in enumerate(token_ids or []):
        if not ids:
            raise bad(param, f"token list {position} is empty", dialect, code="empty", status=400)
        if min(ids) < 0 or max(ids) >= model.vocab_size:
            limits = f"0 to {model.vocab_size - 1}"
            raise bad(param, f"token list {position} has an id outside the model's vocabulary, {limits}", dialect)


def check_texts(texts: list[str], param: str, dialect: Dialect) -> None:
    """Raises ApiError where a text is empty or cannot be written in UTF-8."""
    for position, text in enumerate(texts):
        if not text:
            raise bad(param, f"text {position} is empty", dialect, code="empty", status=400)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            message = f"text {position} holds half a surrogate pair, which is no character"
            raise bad(param, message, dialect) from None


def check_dimensions(dimensions: int | None, model: ServedModel, dialect: Dialect) -> None:
    if dimensions is not None and dimensions > model.dim:
        raise bad("dimensions", f"the model has {model.dim} dimensions; ask for at most as many", dialect)


def shortened(text: str, limit: int = 60) -> str:
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair could not be sent back
    return text if len(text) <= limit else text[:limit] + "..."


def _field_names(form: type[BaseModel]) -> set[str]:
    """Of the form and the forms inside it: a location also holds names of pydantic's own, and keys that a client made up."""
    names = set(form.model_fields)
    for field in form.model_fields.values():
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, BaseModel):
                names |= _field_names(part)
    return names


def _number(text: str) -> float | int:
    """2.0 is an integer to JSON Schema, and some clients write one so."""
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
