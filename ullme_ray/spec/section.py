"""What every part of the job file is built from: a strict, frozen section, and numbers with limits."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, PlainValidator, model_validator
from pydantic_core import CoreSchema

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,45}[a-z0-9])?$")]
ServedName = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._/-]{0,94}[A-Za-z0-9])?$")]


def _auto_or_count(value: Any) -> Any:
    if value == "auto" or (type(value) is int and value > 0):
        return value
    raise ValueError("auto or a whole number above 0")


# One validator and not a union, whose every branch would give an error of its own.
AutoOrCount = Annotated[
    Literal["auto"] | int,
    PlainValidator(_auto_or_count, json_schema_input_type=Literal["auto"] | Annotated[int, Field(gt=0)]),
]


class Section(BaseModel):
    """A part of the job file: unknown keys refused, values never coerced, never changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)


class PromptsSpec(Section):
    query: str = Field("", description="Text put before every query; attended to, left out of mean pooling.")
    passage: str = Field("", description="Text put before every passage; attended to, left out of mean pooling.")


def name_or_mapping(handler: GetJsonSchemaHandler, schema: CoreSchema, name: dict[str, Any]) -> dict[str, Any]:
    """The JSON Schema of a section for which a name alone may stand, and in which no key is required."""
    reference = handler(schema)
    mapping = handler.resolve_ref_schema(reference)
    mapping.pop("required", None)
    whole = {"description": mapping.pop("description", ""), "anyOf": [name, dict(mapping)]}
    mapping.clear()
    mapping.update(whole)
    return reference


class NamedSection(Section):
    """A section for which a name alone may stand: the value of its key `name_key`."""

    name_key: ClassVar[str]

    @model_validator(mode="before")
    @classmethod
    def from_name(cls, value: Any) -> Any:
        return {cls.name_key: value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return name_or_mapping(handler, schema, {"type": "string"})
