"""The columns that a job names, and whether a file has them."""

from __future__ import annotations

from collections.abc import Sequence

from ullme_ray.embed.units import InputFile
from ullme_ray.errors import EmbedError
from ullme_ray.spec.job import EmbedInputSpec


def wanted_columns(spec: EmbedInputSpec) -> list[str]:
    """Each once: the id, the texts, those copied."""
    return list(dict.fromkeys([*([spec.id] if spec.id else []), *spec.text, *spec.columns]))


def check_columns(file: InputFile, spec: EmbedInputSpec, present: Sequence[str]) -> None:
    """Raises EmbedError where a column of the job is missing from a file that has named columns, or is there twice."""
    wanted = {
        "embed.input.id": [spec.id] if spec.id else [],
        "embed.input.text": spec.text,
        "embed.input.columns": spec.columns,
    }
    for where, names in wanted.items():
        for name in names:
            if name not in present:
                raise EmbedError(
                    f"{where} names column {name}, which {file.path} does not have; it has {', '.join(present) or 'none'}"
                )
            if present.count(name) > 1:
                raise EmbedError(f"{where} names column {name}, which {file.path} has twice; rename one of them")
