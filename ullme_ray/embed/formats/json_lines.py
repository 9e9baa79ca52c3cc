"""JSONL, plain or compressed: one object a line, blank lines are no rows.

Planning reads the file once, and units start at the byte noted then. In a compressed file what lies before it is decompressed,
from where the process stopped last.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from ullme_ray import storage
from ullme_ray.embed.formats.kept import text_at
from ullme_ray.embed.units import InputFile, Unit, units_at
from ullme_ray.row_files import TOO_LONG, BadRow, Line, lines, open_unpacked
from ullme_ray.spec.job import EmbedInputSpec

KINDS = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object", type(None): "null"}


def schema(file: InputFile) -> pa.Schema | None:
    """None: every row has its own keys."""
    return None


def units(file: InputFile, rows_per_unit: int) -> list[Unit]:
    with storage.open_read(file.path) as stream:
        offsets = (line.offset for line in _filled_lines(open_unpacked(stream, file.path), 0))
        return units_at(file, offsets, rows_per_unit)


def rows(unit: Unit, spec: EmbedInputSpec) -> Iterator[dict[str, Any] | BadRow]:
    with text_at(unit.file, unit.offset) as text:
        for line in itertools.islice(_filled_lines(text.stream, unit.offset), unit.num_rows):
            text.position = line.stop
            yield _parse(line)


def _filled_lines(stream: Any, offset: int) -> Iterator[Line]:
    return (line for line in lines(stream, offset) if line.content is None or line.content.strip())


def _parse(line: Line) -> dict[str, Any] | BadRow:
    shown = line.start.decode("utf-8", "replace")
    if line.content is None:
        return BadRow(TOO_LONG, shown)
    try:
        row = json.loads(line.content.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError:
        return BadRow("is not valid UTF-8", shown)
    except _TwiceError as error:
        return BadRow(str(error), shown)
    except (ValueError, RecursionError) as error:
        return BadRow(f"is not valid JSON ({error})", shown)
    return row if isinstance(row, dict) else BadRow(f"is {KINDS.get(type(row), 'text')}, not a JSON object", shown)


class _TwiceError(ValueError):
    """An object with two values under one key, of which the json module would keep the last."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(f"has the key {next(name for name in names if names.count(name) > 1)} twice")
    return found
