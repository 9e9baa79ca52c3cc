"""The rows of a unit, good and bad apart: a bad row goes to the dead letters with its reason, and none is lost.

Costs a read of the unit and a few microseconds of Python a row. `formats/` knows how rows lie in files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from deltalake import Schema

from ullme_ray.embed.formats import FORMATS
from ullme_ray.embed.formats.columns import check_columns
from ullme_ray.embed.formats.json_lines import KINDS
from ullme_ray.embed.units import InputFile, Unit
from ullme_ray.errors import DataError, EmbedError
from ullme_ray.row_files import READ_ERRORS, BadRow
from ullme_ray.spec.job import EmbedInputSpec
from ullme_ray.table import id_column

MAX_TEXT_BYTES = 4 * 2**20  # of one document in UTF-8, a long novel; tokenizing takes some 160 times that in memory
_RAW_CHARACTERS = 2000  # of a bad row kept in the dead letters
_INVISIBLE = "\ufeff\u200b\u200c\u200d\u2060"  # a byte order mark, and characters of no width: a text of these has no content

DEAD_LETTER_SCHEMA = pa.schema(
    [("file", pa.string()), ("row", pa.int64()), ("id", pa.string()), ("reason", pa.string()), ("raw", pa.string())]
)


@dataclass(frozen=True)
class UnitRows:
    """The rows of a unit: `good` has the columns id, pass-through columns and `content_hash`, `texts` the texts of its rows."""

    texts: list[str]
    good: pa.Table
    dead: pa.Table  # DEAD_LETTER_SCHEMA


class _BadRowError(Exception):
    """A row that goes to the dead letters; its message is the reason."""


@dataclass(frozen=True, slots=True)
class _GoodRow:
    position: int
    text: str
    kept: list[Any]  # the id, then the pass-through columns


def kept_columns(spec: EmbedInputSpec) -> list[str]:
    """The user's columns that the table has: the id first."""
    return [id_column(spec), *spec.columns]


def column_types(file: InputFile, spec: EmbedInputSpec) -> pa.Schema:
    """The types that the id and the pass-through columns have in the table, as far as this file decides.

    Parquet columns keep theirs, brought to what Delta tables can hold: times of any zone become UTC. Text formats have no
    types: all columns are strings, and JSON values that are not strings are kept as JSON.

    Raises:
        EmbedError: a column of the job is missing, or not of a type that is usable or that a Delta table can hold.
    """
    with readable(file):
        schema = FORMATS[file.format].schema(file)
    if schema is not None:
        check_columns(file, spec, schema.names)
        for name in spec.text:
            kind = _storable(schema.field(name).type)
            if not pa.types.is_string(kind):
                raise EmbedError(
                    f"embed.input.text names column {name}, which is {kind} and not text in {file.path}; choose a text column"
                )
    types = []
    for name in kept_columns(spec):
        is_generated = spec.id is None and name == id_column(spec)
        kind = pa.string() if schema is None or is_generated else _storable(schema.field(name).type)
        if name == spec.id and not (pa.types.is_string(kind) or pa.types.is_integer(kind)):
            raise EmbedError(
                f"embed.input.id names column {name}, which is {kind} in {file.path}; an id is text or a whole number"
            )
        if not _is_storable(kind):
            raise EmbedError(
                f"embed.input.columns names column {name}, which is {kind} in {file.path}, and a Delta table holds no such "
                f"values; leave it out, or write it as a type that Delta has, such as text, a number or a timestamp"
            )
        types.append((name, kind))
    return pa.schema(types)


def _storable(kind: pa.DataType) -> pa.DataType:
    """The nearest type that a Delta table holds without loss."""
    types = pa.types
    if types.is_dictionary(kind):
        return _storable(kind.value_type)
    if types.is_null(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return pa.string()
    if types.is_timestamp(kind):
        return pa.timestamp("us", None if kind.tz is None else "UTC")
    widened = {pa.uint8(): pa.int16(), pa.uint16(): pa.int32(), pa.uint32(): pa.int64(), pa.uint64(): pa.int64()}
    return {**widened, pa.float16(): pa.float32(), pa.large_binary(): pa.binary()}.get(kind, kind)


def _is_storable(kind: pa.DataType) -> bool:
    try:
        Schema.from_arrow(pa.schema([("column", kind)]))
    except Exception:  # noqa: BLE001 - deltalake raises no narrower one
        return False
    return True


def read_unit(unit: Unit, spec: EmbedInputSpec, types: pa.Schema) -> UnitRows:
    """Reads a unit and sorts out its bad rows.

    Args:
        types: of the columns kept, from `column_types`.

    Raises:
        EmbedError: the file cannot be read, or is no longer the version that was planned.
    """
    with readable(unit.file):
        rows = list(FORMATS[unit.file.format].rows(unit, spec))
    if len(rows) != unit.num_rows or not unit.file.unchanged:
        raise EmbedError(f"{unit.file.path} changed while it was read; run again")
    good: list[_GoodRow] = []
    dead: dict[int, dict[str, Any]] = {}
    for position, row in enumerate(rows, start=unit.start):
        row_id: Any = None
        try:
            if isinstance(row, BadRow):
                raise _BadRowError(row.reason)
            row_id = _row_id(row, position, unit, spec)
            kept = [row_id, *(_pass_through(row.get(name), unit.file) for name in spec.columns)]
            good.append(_GoodRow(position, _text(row, spec), kept))
        except _BadRowError as reason:
            raw = row.start if isinstance(row, BadRow) else _shown(row)
            dead[position] = _dead_letter(unit, position, row_id, str(reason), raw)
    for position, (name, value) in _unfit(good, types, unit.file).items():
        dead[position] = _dead_letter(unit, position, None, f"{name} does not fit the table's {types.field(name).type}", value)
    good = [row for row in good if row.position not in dead]
    table = pa.table([pa.array([row.kept[at] for row in good], kind) for at, kind in enumerate(types.types)], schema=types)
    hashes = [hashlib.sha256(row.text.encode()).hexdigest() for row in good]
    return UnitRows(
        [row.text for row in good],
        table.append_column("content_hash", pa.array(hashes, pa.string())),
        pa.Table.from_pylist([dead[position] for position in sorted(dead)], schema=DEAD_LETTER_SCHEMA),
    )


def _dead_letter(unit: Unit, position: int, row_id: Any, reason: str, raw: str) -> dict[str, Any]:
    known_id = None if row_id is None else _shown(row_id)
    number = 0 if unit.file.members else position  # in a plain text there is but one
    return {"file": unit.file.path_of(position), "row": number, "id": known_id, "reason": reason, "raw": _shown(raw)}


def _unfit(good: list[_GoodRow], types: pa.Schema, file: InputFile) -> dict[int, tuple[str, str]]:
    """Rows (by position) with a value that its column of the table cannot hold, such as a number of too many bits.

    Raises:
        EmbedError: the whole column is of another type.
    """
    unfit = {}
    for at, field in enumerate(types):
        if _array([row.kept[at] for row in good], field.type) is None:
            schema = FORMATS[file.format].schema(file)
            kind = pa.string() if schema is None else _storable(schema.field(field.name).type)
            if kind != field.type and not (pa.types.is_integer(kind) and pa.types.is_integer(field.type)):
                raise EmbedError(f"column {field.name} of {file.path} is {kind}, which does not fit the table's {field.type}")
            for row in good:
                if _array([row.kept[at]], field.type) is None:
                    unfit[row.position] = field.name, _shown(row.kept[at])
    return unfit


def _array(values: list[Any], kind: pa.DataType) -> pa.Array | None:
    try:
        return pa.array(values, kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return None


def _text(row: dict[str, Any], spec: EmbedInputSpec) -> str:
    """The text columns joined with a newline, null and blank ones left out."""
    values = [row.get(name) for name in spec.text]
    for name, value in zip(spec.text, values):
        if value is not None and not isinstance(value, str):
            raise _BadRowError(f"{name} is {_kind(value)}, not text")
    parts = [value for value in values if value is not None and not _is_blank(value)]
    named = " and ".join(spec.text)
    if not parts:
        raise _BadRowError(f"{named} is null" if all(value is None for value in values) else f"{named} is empty")
    text = "\n".join(parts)
    num_bytes = _num_bytes(text)
    if num_bytes is None:
        raise _BadRowError(f"{named} is not valid UTF-8")
    if num_bytes > MAX_TEXT_BYTES:
        raise _BadRowError(f"{named} is longer than {MAX_TEXT_BYTES // 2**20} MiB")
    if "\0" in text:
        raise _BadRowError(f"{named} has NUL characters, as binary data does")
    return text


def _row_id(row: dict[str, Any], position: int, unit: Unit, spec: EmbedInputSpec) -> Any:
    if spec.id is None:
        return unit.file.generated_id(position)
    value = row.get(spec.id)
    if value is None or (isinstance(value, str) and _is_blank(value)):
        raise _BadRowError(f"{spec.id} is {'null' if value is None else 'empty'}")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _BadRowError(f"{spec.id} is {_kind(value)}; an id is text or a whole number")
    if _num_bytes(str(value)) is None:
        raise _BadRowError(f"{spec.id} is not valid UTF-8")
    if "\0" in str(value):
        raise _BadRowError(f"{spec.id} has NUL characters, as binary data does")
    return value if unit.file.format == "parquet" else str(value)


def _pass_through(value: Any, file: InputFile) -> Any:
    """A copied value: typed in Parquet, else text, with JSON values that are not strings as JSON."""
    if file.format == "parquet" or value is None:
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if _num_bytes(text) is not None else text.encode("utf-8", "replace").decode()


def _is_blank(text: str) -> bool:
    return not text.strip().strip(_INVISIBLE).strip()


def _num_bytes(text: str) -> int | None:
    """In UTF-8; None for lone surrogates: broken UTF-8, or JSON escapes such as \\ud800."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return None


def _kind(value: Any) -> str:
    return KINDS.get(type(value), type(value).__name__)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text[:_RAW_CHARACTERS].encode("utf-8", "replace").decode()


def id_hashes(ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A number of 64 bits for each id, from its text: (N,) uint64. Among 10^9 ids two share one by chance in 1 case of 37."""
    digests = b"".join(hashlib.blake2b(str(value).encode(), digest_size=8).digest() for value in ids.to_pylist())
    return np.frombuffer(digests, np.uint64)


def find_duplicates(hashes: Sequence[np.ndarray]) -> np.ndarray:
    """The numbers that occur more than once over all arrays, sorted, each once. Takes 17 bytes of memory a number."""
    together = np.concatenate([np.empty(0, np.uint64), *hashes])
    together.sort()
    repeated = together[1:][together[1:] == together[:-1]]
    return np.unique(repeated)


@contextlib.contextmanager
def readable(file: InputFile) -> Iterator[None]:
    """Turns what a broken file raises (truncated gzip, damaged Parquet, a quote left open) into one error that names it.

    A store that does not answer is another matter: nothing need be repaired then, and StorageError says so.
    """
    try:
        yield
    except FileNotFoundError:
        raise EmbedError(f"{file.path} was there when the corpus was listed and is gone now; run again") from None
    except DataError as error:
        raise EmbedError(str(error)) from error
    except READ_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EmbedError(
            f"{file.path} cannot be read to its end ({reason}); repair or remove the file, then run again"
        ) from error
