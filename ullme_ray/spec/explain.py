"""A pydantic error -> a sentence that says what is wrong, the value, and what to do. Never shows what may be a secret."""

from __future__ import annotations

import difflib
import types
import typing
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ullme_ray.spec.job import JobSpec
from ullme_ray.spec.yaml_tree import KeyPath, may_hold_secret

_NEAR = 0.6  # of difflib: `wieght` finds weight, `foo` finds nothing


def explain(detail: Any) -> str:
    """The sentence for one entry of `ValidationError.errors()`; its subject is the dotted path."""
    kind, path = detail["type"], detail["loc"]
    if kind == "missing":
        return f"is missing. {_description(path)}"
    if kind == "extra_forbidden":
        return "is not a known key; " + _way_out_of_unknown_key(path)
    if kind == "secret_reference":
        return detail["msg"]  # never with the value: it may be the secret itself
    value = shown(path, detail["input"])
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        return f"= {value} must be a mapping with keys {', '.join(known_keys(path))}. {_description(path)}"
    if kind in ("tuple_type", "list_type"):
        return f"= {value} must be a list, such as [a, b] or lines that begin with `- `. {_description(path)}"
    if kind == "too_short" and detail["input"] in ([], ()):
        return f"is an empty list. {_description(path)}"
    if kind == "string_too_short":
        return f"is an empty text. {_description(path)}"
    if kind == "literal_error":
        return _explain_literal(path, detail, value)
    if kind == "string_pattern_mismatch":
        return f"= {value} is not allowed. {_description(path)}"
    expected = detail["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"= {value} should be {expected}. {_description(path)}"


def shown(path: KeyPath, value: Any) -> str:
    """The value as a message may show it: short, and `***` where it could be a secret."""
    if may_hold_secret(path):
        return "***"
    if isinstance(value, dict):
        return f"a mapping of {len(value)}"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    try:
        text = repr(value)
    except ValueError:  # an int of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


def field_at(path: KeyPath) -> FieldInfo | None:
    """The field that the spec has at `path`; None for unknown keys and for list items."""
    parent = _section_at(path[:-1])
    return parent.model_fields.get(str(path[-1])) if parent is not None and path else None


def known_keys(path: KeyPath) -> list[str]:
    """The keys of the section at `path`."""
    section = _section_at(path)
    return list(section.model_fields) if section else []


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a field's annotation holds, also inside `X | None` and `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple, typing.Annotated):
        for argument in typing.get_args(annotation):
            if (found := section_in(argument)) is not None:
                return found
    return None


def _section_at(path: KeyPath) -> type[BaseModel] | None:
    section: type[BaseModel] | None = JobSpec
    for step in path:
        if section is None:
            return None
        if isinstance(step, int):
            continue  # section_in already looked inside the list
        field = section.model_fields.get(step)
        section = section_in(field.annotation) if field else None
    return section


def _description(path: KeyPath) -> str:
    while path and isinstance(path[-1], int):  # a list item is described by its list
        path = path[:-1]
    field = field_at(path)
    return (field and field.description) or "see `ullme-ray check --schema`"


def _way_out_of_unknown_key(path: KeyPath) -> str:
    key, known = str(path[-1]), known_keys(path[:-1])
    near = difflib.get_close_matches(key, known, n=1, cutoff=_NEAR)
    if near:
        return f"did you mean {near[0]}?"
    homes = [f"{name}.{key}" for name, field in JobSpec.model_fields.items() if key in known_keys((name,)) and field]
    belongs = f"{homes[0]} is one; " if len(homes) == 1 else ""
    return f"{belongs}known here: {', '.join(known)}"


def _explain_literal(path: KeyPath, detail: Any, value: str) -> str:
    expected = detail["ctx"]["expected"]
    choices = [choice.strip("' ") for choice in expected.replace(" or ", ",").split(",")]
    near = difflib.get_close_matches(str(detail["input"]), choices, n=1, cutoff=_NEAR)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"= {value} must be one of {expected}{hint}"
