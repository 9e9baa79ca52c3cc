"""Secrets are named in a job file, never written in it: `env:NAME` or `file:PATH`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, SecretStr
from pydantic_core import PydanticCustomError, core_schema

from ullme_ray.errors import UllmeError

_PATTERN = r"^(env:[A-Za-z_][A-Za-z0-9_]*|file:.+)$"


class SecretRef:
    """A reference to a secret. Printing it shows the reference; `reveal()` reads the value, which prints as `***`."""

    __slots__ = ("reference",)

    def __init__(self, reference: str) -> None:
        self.reference = reference

    def reveal(self) -> SecretStr:
        """The secret's value.

        Raises:
            UllmeError: the variable or file is missing or empty; the value is never part of the message.
        """
        kind, _, target = self.reference.partition(":")
        if kind == "env":
            value = os.environ.get(target, "")
            missing = f"environment variable {target} is not set"
        else:
            path = Path(target).expanduser()
            value = path.read_text().strip() if path.is_file() else ""
            missing = f"file {target} is missing or empty"
        if not value:
            raise UllmeError(f"secret {self.reference} cannot be read: {missing}")
        return SecretStr(value)

    def reveal_list(self) -> list[SecretStr]:
        """The secret as several values, one per line or separated by commas."""
        parts = re.split(r"[\n,]", self.reveal().get_secret_value())
        return [SecretStr(part.strip()) for part in parts if part.strip()]

    def __repr__(self) -> str:
        return f"SecretRef({self.reference!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SecretRef) and other.reference == self.reference

    def __hash__(self) -> int:
        return hash(self.reference)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        def parse(value: Any) -> SecretRef:
            if isinstance(value, SecretRef):
                return value
            if not isinstance(value, str) or not re.fullmatch(_PATTERN, value):
                raise PydanticCustomError("secret_reference", "is a secret and must be a reference: env:NAME or file:PATH")
            return cls(value)

        return core_schema.no_info_plain_validator_function(
            parse, serialization=core_schema.plain_serializer_function_ser_schema(lambda ref: ref.reference)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "pattern": _PATTERN}
