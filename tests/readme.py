"""The parts of README that are generated: `python tests/readme.py` makes them anew. A test holds README against them.

They stand between `<!-- NAME -->` and `<!-- /NAME -->`: the decoder families, measured, and every key of the job file.
"""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ullme_ray.spec import JobSpec
from ullme_ray.spec.secrets import SecretRef

README = Path(__file__).parents[1] / "README.md"


def replaced(readme: str, name: str, content: str) -> str:
    """README's text with one generated part made anew."""
    before, start, rest = readme.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"\n<!-- /{name} -->")
    assert start, f"README has lost its marker {name}"
    assert end, f"README has lost its end marker {name}"
    return f"{before}{start}{content}{end}{after}"


def families_table() -> str:
    """Which decoder families can embed, by experiment."""
    sys.path.insert(0, str(Path(__file__).parent / "unit"))
    from test_families import families_table

    return families_table()


def keys_table() -> str:
    """Every key of the job file with its kind, default and meaning."""
    lines = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    for path, field in _fields(JobSpec, ""):
        meaning = (field.description or "").replace("|", "\\|")
        lines.append(f"| `{path}` | {_kind(field.annotation)} | {_default(path, field)} | {meaning} |")
    return "\n".join(lines)


def _fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        section, is_list = _section(field.annotation)
        path = f"{prefix}{name}"
        if section is None:
            yield path, field
        else:
            yield from _fields(section, f"{path}[]." if is_list else f"{path}.")


def _section(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    is_list = typing.get_origin(annotation) is tuple
    for argument in typing.get_args(annotation):
        found, below = _section(argument)
        if found is not None:
            return found, is_list or below
    return None, False


def _kind(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _kind(arguments[0])
    if origin is typing.Literal:
        return " \\| ".join(f"`{value}`" for value in arguments)
    if origin is dict:
        return f"mapping of {_kind(arguments[0])} to {_kind(arguments[1])}"
    if origin is tuple:
        return f"list of {_kind(arguments[0])}"
    if origin in (typing.Union, types.UnionType):
        return " \\| ".join(_kind(argument) for argument in arguments if argument is not type(None))
    if annotation is SecretRef:
        return "`env:NAME` or `file:PATH`"
    return {str: "text", int: "whole number", float: "number", bool: "true \\| false"}[annotation]


def _default(path: str, field: FieldInfo) -> str:
    if field.is_required():
        return "the preset's" if path.startswith("train.objective.") else "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return "`[" + ", ".join(map(str, value)) + "]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value!r}`".replace("'", '"')


def generated(readme: str) -> str:
    """README's text with all generated parts made anew."""
    return replaced(replaced(readme, "families", families_table()), "keys", keys_table())


if __name__ == "__main__":
    README.write_text(generated(README.read_text(encoding="utf-8")), encoding="utf-8")
