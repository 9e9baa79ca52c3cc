"""Broken corpora of every kind: a bad row ends in the dead letters with its reason, and its neighbours do not.

A file that is not whole, or a table that is not what it seems, stops the run with an error that names it.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from ullme_ray.embed import reading
from ullme_ray.embed.planning import list_input, split_file
from ullme_ray.errors import EmbedError, UllmeError
from ullme_ray.row_files import MAX_ROW_BYTES
from ullme_ray.spec.job import EmbedInputSpec, JobSpec

GOOD = {"id": "good", "title": "t", "body": "b", "lang": "en"}
GOOD_LINE = json.dumps(GOOD).encode() + b"\n"
GOOD_RECORD = b"good,t,b,en\n"
HEADER = b"id,title,body,lang\n"
HUGE = "x" * (reading.MAX_TEXT_BYTES + 1)


@dataclass(frozen=True)
class Row:
    """One broken row and the start of its reason."""

    content: Any
    reason: str
    known_id: str | None = None  # what the dead letter says of its id


def line(**values: Any) -> bytes:
    return json.dumps({"id": "1", "title": "x", **values}).encode()


JSON_LINES = {
    "nulls": Row(line(title=None, body=None), "title and body is null", "1"),
    "no text column": Row(b'{"id": "1"}', "title and body is null", "1"),
    "empty and white space": Row(line(title="", body=" \n\t\u3000"), "title and body is empty", "1"),
    "characters without width": Row(line(title="\u200b\ufeff", body="\u2060 \u200d"), "title and body is empty", "1"),
    "number for a text": Row(line(body=7), "body is a number, not text", "1"),
    "fraction for a text": Row(line(body=0.5), "body is a number, not text", "1"),
    "NaN for a text": Row(b'{"id": "1", "title": NaN}', "title is a number, not text", "1"),
    "list for a text": Row(line(body=["y"]), "body is a list, not text", "1"),
    "list of nothing for a text": Row(line(body=[None]), "body is a list, not text", "1"),
    "object for a text": Row(line(title={"a": None}), "title is an object, not text", "1"),
    "true for a text": Row(line(title=True), "title is true or false, not text", "1"),
    "null id": Row(line(id=None), "id is null"),
    "no id": Row(b'{"title": "x"}', "id is null"),
    "empty id": Row(line(id=""), "id is empty"),
    "blank id": Row(line(id=" \n"), "id is empty"),
    "fraction for an id": Row(line(id=1.5), "id is a number; an id is text or a whole number"),
    "infinite id": Row(b'{"id": 1e999, "title": "x"}', "id is a number; an id is text or a whole number"),
    "true for an id": Row(line(id=True), "id is true or false; an id is text or a whole number"),
    "list for an id": Row(line(id=["1"]), "id is a list; an id is text or a whole number"),
    "lone surrogate in an id": Row(line(id="\ud800"), "id is not valid UTF-8"),
    "NUL in an id": Row(line(id="a\0b"), "id has NUL characters"),
    "lone surrogate": Row(line(title="\ud800"), "title and body is not valid UTF-8", "1"),
    "reversed surrogates": Row(line(title="\udc00\ud800"), "title and body is not valid UTF-8", "1"),
    "NUL escaped": Row(line(title="a\0b"), "title and body has NUL characters", "1"),
    "NUL itself": Row(b'{"id": "1", "title": "a\0b"}', "is not valid JSON"),
    "a row of NULs": Row(b"\0" * 40, "is not valid JSON"),
    "cut off": Row(b'{"id": "1", "title": "x"', "is not valid JSON"),
    "two objects": Row(line() + line(), "is not valid JSON"),
    "key twice": Row(b'{"id": "1", "title": "x", "title": "y"}', "has the key title twice"),
    "no JSON": Row(b"not json", "is not valid JSON"),
    "single quotes": Row(b"{'id': '1'}", "is not valid JSON"),
    "list for a row": Row(b'["a"]', "is a list, not a JSON object"),
    "number for a row": Row(b"17", "is a number, not a JSON object"),
    "text for a row": Row(b'"x"', "is text, not a JSON object"),
    "null for a row": Row(b"null", "is null, not a JSON object"),
    "nested too deeply": Row(b"[" * 100_000, "is not valid JSON"),
    "number of too many digits": Row(b'{"id": ' + b"9" * 5000 + b', "title": "x"}', "is not valid JSON"),
    "not UTF-8": Row(b'{"id": "1", "title": "\xff"}', "is not valid UTF-8"),
    "Latin-1": Row('{"id": "1", "title": "caf\xe9"}'.encode("latin-1"), "is not valid UTF-8"),
    "character cut in two": Row('{"id": "1", "title": "漢'.encode()[:-1] + b'"}', "is not valid UTF-8"),
    "surrogates in UTF-8": Row(b'{"id": "1", "title": "\xed\xa0\x80"}', "is not valid UTF-8"),
    "byte order mark in the middle": Row(b"\xef\xbb\xbf" + line(), "is not valid JSON (Unexpected UTF-8 BOM"),
    "huge text": Row(line(body=HUGE), "title and body is longer than 4 MiB", "1"),
    "huge line": Row(b'{"id": "' + b"x" * MAX_ROW_BYTES + b'"}', "is a line of 64 MiB or more"),
}

RECORDS = {
    "empty": Row(b"1,,,en", "title and body is empty", "1"),
    "white space": Row(b'1," ","\t\n",en', "title and body is empty", "1"),
    "empty id": Row(b",x,y,en", "id is empty"),
    "too few fields": Row(b"1,short", "has 2 fields, the header 4"),
    "too many fields": Row(b"1,a,b,c,d", "has 5 fields, the header 4"),
    "text after a quote": Row(b'1,"a"b,c,en', "is not CSV"),
    "not UTF-8": Row(b"1,\xff,,en", "title and body is not valid UTF-8", "1"),
    "id not UTF-8": Row(b"\xff,x,y,en", "id is not valid UTF-8"),
    "NUL": Row(b"1,a\0b,,en", "title and body has NUL characters", "1"),
    "huge text": Row(b"1," + HUGE.encode() + b",,en", "title and body is longer than 4 MiB", "1"),
}


def between(good: Any, bad: Any, kind: pa.DataType | None = None) -> pa.Array:
    """A column of three rows, of which the middle one is broken."""
    return pa.array([good, bad, good], kind)


PARQUET = {
    "null texts": Row({"title": between("t", None), "body": between("b", None)}, "title and body is null", "1"),
    "empty texts": Row({"title": between("t", " "), "body": between("b", "")}, "title and body is empty", "1"),
    "null id": Row({"id": between("good", None)}, "id is null"),
    "empty id": Row({"id": between("good", "")}, "id is empty"),
    "null number for an id": Row({"id": between(5, None)}, "id is null"),
    "id of too many bits": Row({"id": between(5, 2**64 - 1, pa.uint64())}, "id does not fit the table's int64"),
    "copied number of too many bits": Row({"lang": between(5, 2**63, pa.uint64())}, "lang does not fit the table's int64"),
    "date past Python's": Row({"lang": between(0, 2**30, pa.int32()).view(pa.date32())}, "has a value that Python cannot hold"),
    "NUL": Row({"title": between("t", "a\0b")}, "title and body has NUL characters", "1"),
    "huge text": Row({"title": between("t", HUGE)}, "title and body is longer than 4 MiB", "1"),
    "not UTF-8": Row({"title": between(b"t", b"\xff").view(pa.string())}, "is not UTF-8"),
    "character cut in two": Row({"title": between(b"t", "漢".encode()[:-1]).view(pa.string())}, "is not UTF-8"),
}

TEXT_FILES = {
    "empty": Row(b"", "text is empty", "bad.md"),
    "white space": Row(b"\n \n", "text is empty", "bad.md"),
    "byte order mark alone": Row(b"\xef\xbb\xbf", "text is empty", "bad.md"),
    "not UTF-8": Row(b"caf\xe9", "is not valid UTF-8"),
    "UTF-16": Row("text".encode("utf-16"), "is not valid UTF-8"),
    "character cut in two": Row("漢".encode()[:-1], "is not valid UTF-8"),
    "binary": Row(b"\x7fELF\0\0", "text has NUL characters", "bad.md"),
    "huge": Row(b"x" * (MAX_ROW_BYTES + 1), "is a file of more than 64 MiB"),
}


def test_the_table_is_as_long_as_promised() -> None:
    assert len(JSON_LINES) >= 25
    assert len(JSON_LINES) + len(RECORDS) + len(PARQUET) + len(TEXT_FILES) >= 70


def spec_of(path: Path, **given: Any) -> EmbedInputSpec:
    given = given or {"id": "id", "text": ["title", "body"], "columns": ["lang"]}
    job = JobSpec.model_validate({"name": "c", "model": {"base": "x"}, "embed": {"input": {"path": str(path), **given}}})
    assert job.embed is not None
    return job.embed.input


def read_all(path: Path, rows_per_unit: int, **given: Any) -> list[reading.UnitRows]:
    """As a run does; every unit's rows in = good + dead is checked."""
    spec = spec_of(path, **given)
    settings = {"name": "c", "storage": str(path.parent / "runs"), "model": {"base": "x"}}
    files = list_input(JobSpec.model_validate({**settings, "embed": {"input": spec, "rows_per_unit": rows_per_unit}}))
    types = reading.column_types(files[0], spec)
    found = []
    for unit in [unit for file in files for unit in split_file(file, rows_per_unit)]:
        rows = reading.read_unit(unit, spec, types)
        assert unit.num_rows == rows.good.num_rows + rows.dead.num_rows == len(rows.texts) + rows.dead.num_rows
        found.append(rows)
    return found


def check_dead(read: list[reading.UnitRows], row: Row, path: Path, position: int, good: list[str]) -> None:
    assert [text for unit in read for text in unit.texts] == good
    (dead,) = [letter for unit in read for letter in unit.dead.to_pylist()]
    assert dead["reason"].startswith(row.reason)
    assert (dead["file"], dead["row"], dead["id"]) == (str(path), position, row.known_id)
    assert len(dead["raw"]) <= 2000
    assert dead["raw"] or not row.content


@pytest.mark.parametrize("rows_per_unit", [1, 100])
@pytest.mark.parametrize("kind", JSON_LINES)
def test_a_broken_json_line(tmp_path: Path, kind: str, rows_per_unit: int) -> None:
    row, path = JSON_LINES[kind], tmp_path / "c.jsonl"
    path.write_bytes(GOOD_LINE + row.content + b"\n\n" + GOOD_LINE)  # a blank line is no row
    check_dead(read_all(path, rows_per_unit), row, path, 1, ["t\nb"] * 2)


@pytest.mark.parametrize("rows_per_unit", [1, 100])
@pytest.mark.parametrize("kind", RECORDS)
def test_a_broken_csv_record(tmp_path: Path, kind: str, rows_per_unit: int) -> None:
    row, path = RECORDS[kind], tmp_path / "c.csv"
    path.write_bytes(b"\xef\xbb\xbf" + HEADER + GOOD_RECORD + row.content + b"\n\n" + GOOD_RECORD)
    check_dead(read_all(path, rows_per_unit), row, path, 1, ["t\nb"] * 2)


@pytest.mark.parametrize("rows_per_unit", [1, 100])
@pytest.mark.parametrize("kind", PARQUET)
def test_a_broken_parquet_row(tmp_path: Path, kind: str, rows_per_unit: int) -> None:
    row, path = PARQUET[kind], tmp_path / "c.parquet"
    columns = {name: between(value, "1") for name, value in GOOD.items()}
    pq.write_table(pa.table({**columns, **row.content}), path)
    check_dead(read_all(path, rows_per_unit), row, path, 1, ["t\nb"] * 2)


@pytest.mark.parametrize("kind", TEXT_FILES)
def test_a_broken_text_file(tmp_path: Path, kind: str) -> None:
    row, folder = TEXT_FILES[kind], tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbffirst")
    (folder / "bad.md").write_bytes(row.content)
    (folder / "c.txt").write_text("last")
    check_dead(read_all(folder, 100, text=["text"]), row, folder / "bad.md", 0, ["first", "last"])


MANY = GOOD_LINE * 5000


def truncated(codec: str) -> bytes:
    return bytes(pa.compress(MANY, codec=codec, asbytes=True))[:-9]


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def parquet_bytes(**columns: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({**{name: [value] * 50 for name, value in GOOD.items()}, **columns}), sink, compression="zstd")
    return bytes(sink.getvalue())


NOT_WHOLE = "cannot be read to its end"
FILES: dict[str, tuple[str, bytes, str]] = {
    "gzip cut off": ("c.jsonl.gz", gzip.compress(MANY)[:-12], NOT_WHOLE),
    "gzip without its end": ("c.csv.gz", gzip.compress(HEADER + GOOD_RECORD)[:-4], NOT_WHOLE),
    "gzip with a wrong checksum": ("c.jsonl.gz", flipped(gzip.compress(MANY), -6), NOT_WHOLE),
    "gzip and rubbish": ("c.jsonl.gz", gzip.compress(MANY) + b"rubbish", NOT_WHOLE),
    "zstd cut off": ("c.jsonl.zst", truncated("zstd"), NOT_WHOLE),
    "zstd in CSV cut off": ("c.csv.zst", bytes(pa.compress(HEADER + GOOD_RECORD, codec="zstd", asbytes=True))[:-3], NOT_WHOLE),
    "empty gzip": ("c.jsonl.gz", b"", "is empty, which no gzip file is"),
    "empty zstd": ("c.csv.zst", b"", "is empty, which no zstd file is"),
    "text named gzip": ("c.jsonl.gz", GOOD_LINE, NOT_WHOLE),
    "zstd named gzip": ("c.jsonl.gz", truncated("zstd"), NOT_WHOLE),
    "gzip named text": ("c.jsonl", gzip.compress(MANY), "holds gzip data, which its name does not say"),
    "gzip in gzip": ("c.jsonl.gz", gzip.compress(gzip.compress(MANY)), "holds gzip data, which its name does not say"),
    "Parquet named JSONL": ("c.jsonl", parquet_bytes(), "holds Parquet data, which its name does not say"),
    "UTF-16": ("c.jsonl", GOOD_LINE.decode().encode("utf-16"), "holds UTF-16 data"),
    "quote never closed": ("c.csv", HEADER + GOOD_RECORD + b'1,"a,b,en\n' + GOOD_RECORD, "line 3 opens a quote that is never"),
    "CSV without a header": ("c.csv", b"", "does not have; it has none"),
    "CSV of other columns": ("c.csv", b"id,text\n1,x\n", "names column title, which .* does not have; it has id, text"),
    "CSV with a column twice": ("c.csv", b"id,title,title,body,lang\n", "names column title, which .* has twice"),
    "CSV with a broken header": ("c.csv", b'"id"x,title\n', "begins with no CSV header"),
    "Parquet cut off": ("c.parquet", parquet_bytes()[:-20], NOT_WHOLE),
    "Parquet without its start": ("c.parquet", parquet_bytes()[100:], NOT_WHOLE),
    "Parquet damaged inside": ("c.parquet", flipped(parquet_bytes(), 40), NOT_WHOLE),
    "empty Parquet": ("c.parquet", b"", NOT_WHOLE),
    "Parquet with numbers for text": ("c.parquet", parquet_bytes(title=[1] * 50), "title, which is int64 and not text"),
    "Parquet with fractions for ids": (
        "c.parquet",
        parquet_bytes(id=[1.5] * 50),
        "id, which is double .* text or a whole number",
    ),
    "Parquet with lists for ids": ("c.parquet", parquet_bytes(id=[["a"]] * 50), "id, which is list<.* text or a whole number"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_not_whole_is_named(tmp_path: Path, kind: str) -> None:
    name, content, message = FILES[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EmbedError, match=message) as caught:
        read_all(tmp_path / name, 10)
    assert str(tmp_path / name) in str(caught.value)


def test_the_same_files_undamaged_are_read(tmp_path: Path) -> None:
    """The control of the table above."""
    whole = {
        "a.jsonl.gz": gzip.compress(MANY),
        "b.jsonl.zst": bytes(pa.compress(MANY, codec="zstd", asbytes=True)),
        "c.csv": HEADER + GOOD_RECORD + b'1,"a\n",b,en\n',
        "d.parquet": parquet_bytes(),
    }
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
        read = read_all(tmp_path / name, 3000)
        assert sum(unit.good.num_rows for unit in read) == {"c.csv": 2, "d.parquet": 50}.get(name, 5000)
        assert sum(unit.dead.num_rows for unit in read) == 0


def test_a_file_of_other_types_than_the_first_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(lang=[1] * 50))
    (tmp_path / "b.parquet").write_bytes(parquet_bytes())
    with pytest.raises(EmbedError, match=r"column lang of .*b.parquet is string, which does not fit the table's int64"):
        read_all(tmp_path, 10)


def delta_table(folder: Path) -> Path:
    path = folder / "my table"
    write_deltalake(path, pa.table({name: [value] * 8 for name, value in GOOD.items()}), partition_by=["lang"])
    return path


def edit_log(path: Path, **actions: dict[str, Any]) -> None:
    """Puts values into the actions of a table's first version."""
    log = path / "_delta_log" / "00000000000000000000.json"
    lines = [json.loads(text) for text in log.read_text().splitlines()]
    for entry in lines:
        for name, values in actions.items():
            if name in entry:
                entry[name].update(values)
    log.write_text("".join(json.dumps(entry) + "\n" for entry in lines))


PLAIN = {"id": "id", "text": ["title"]}
MARKED = {
    "storageType": "i",
    "pathOrInlineDv": "^Bg9^0rr910000000000iXQKl0rr91000f55c8Xg0@@D72lkbi5=-{L",
    "sizeInBytes": 44,
    "cardinality": 6,
}


def with_deletion_vectors(path: Path, **add: Any) -> None:
    features = {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": ["deletionVectors"]}
    edit_log(path, protocol={**features, "writerFeatures": ["deletionVectors"]}, add=add)


def test_a_delta_table_with_deletion_vectors_is_refused_and_one_that_only_might_have_them_is_not(tmp_path: Path) -> None:
    path = delta_table(tmp_path)
    with_deletion_vectors(path)
    assert sum(unit.good.num_rows for unit in read_all(path, 100, **PLAIN)) == 8
    with_deletion_vectors(path, deletionVector=MARKED)
    with pytest.raises(EmbedError, match=r"the Delta table .*my table has deletion vectors"):
        read_all(path, 100, **PLAIN)


def test_delta_tables_whose_files_do_not_hold_what_the_job_names_are_refused(tmp_path: Path) -> None:
    path = delta_table(tmp_path)
    assert sum(unit.good.num_rows for unit in read_all(path, 100, **PLAIN)) == 8  # the control
    with pytest.raises(EmbedError, match=r"names column lang, by which the Delta table .*my table is partitioned"):
        read_all(path, 100, **PLAIN, columns=["lang"])
    with pytest.raises(EmbedError, match=r"lies in a Delta table, .*name the table itself: .*my table"):
        read_all(path / "**" / "*.parquet", 100, **PLAIN)
    for file in DeltaTable(path).file_uris():
        Path(file.replace("%20", " ")).unlink()
    with pytest.raises(EmbedError, match=r"\.parquet was there when the corpus was listed and is gone now"):
        read_all(path, 100, **PLAIN)
    edit_log(path, metaData={"configuration": {"delta.columnMapping.mode": "name"}})
    with pytest.raises(EmbedError, match=r"the Delta table .*my table maps its columns to other names"):
        read_all(path, 100, **PLAIN)


def test_a_folder_that_is_no_delta_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "t" / "_delta_log").mkdir(parents=True)
    (tmp_path / "t" / "a.jsonl").write_bytes(GOOD_LINE)
    with pytest.raises(UllmeError, match=rf"{tmp_path}/t"):
        read_all(tmp_path / "t", 100)
