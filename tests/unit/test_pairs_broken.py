"""Broken training data of every kind: each row is accepted or listed as rejected, or the run stops and names the file."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ullme_ray.errors import DataError
from ullme_ray.pairs import read_sources
from ullme_ray.pairs.readers import read_rows
from ullme_ray.pairs.rows import MAX_TEXT_BYTES
from ullme_ray.spec import JobSpec

GOOD = b'{"query": "q", "positive": "p", "negative": "n"}\n'
LIMIT_S = 60


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError("reading hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "cache"))


def make_job(folder: Path, path: Path, **train: Any) -> JobSpec:
    settings = {"data": [{"path": str(path)}], "max_rejected_share": 1.0, **train}
    return JobSpec.model_validate({"name": "t", "storage": str(folder / "runs"), "model": {"base": "m"}, "train": settings})


def rejects_of(folder: Path) -> list[dict[str, Any]]:
    file = folder / "runs" / "t" / "rejects.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@dataclass(frozen=True)
class Rows:
    """What a file is to give: usable rows, and the reason of each other one by its row or line number."""

    name: str
    content: bytes
    accepted: int
    rejected: dict[int, str]


@dataclass(frozen=True)
class Refused:
    """A file that stops the run with an error that names it and says this."""

    name: str
    content: bytes
    message: str


def row(**values: Any) -> bytes:
    return json.dumps({"query": "q", "positive": "p", **values}).encode() + b"\n"


def parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def table(**columns: Any) -> bytes:
    return parquet(pa.table({"query": ["q1", "q2"], "positive": ["p1", "p2"], **columns}))


def stream(*, end: bool) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pa.schema([("query", pa.string()), ("positive", pa.string())])) as writer:
        writer.write_batch(pa.record_batch({"query": ["q1", "q2"], "positive": ["p1", "p2"]}))
    data = sink.getvalue().to_pybytes()
    return data if end else data[:-8]


def strings(*values: bytes) -> pa.Array:
    """A string column that may hold what is no UTF-8, as careless writers make."""
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
    return pa.Array.from_buffers(
        pa.string(), len(values), [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(b"".join(values))]
    )


def compressed(codec: str, data: bytes = GOOD * 3) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as out:
        out.write(data)
    return sink.getvalue().to_pybytes()


MANY = b"".join(row(query=f"question {i * i}") for i in range(20_000))
DEEP = b"[" * 200_000 + b"]" * 200_000
TWICE = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["query", "query", "positive"])

CASES: dict[str, Rows | Refused] = {
    # JSON lines
    "control: nothing broken": Rows("a.jsonl", GOOD * 3, 3, {}),
    "bad JSON": Rows("a.jsonl", GOOD + b"{broken\n" + GOOD, 2, {2: "is not JSON"}),
    "cut in the last line": Rows("a.jsonl", (GOOD * 2)[:-9], 1, {2: "is not JSON"}),
    "no newline at the end": Rows("a.jsonl", (GOOD * 2)[:-1], 2, {}),
    "trailing garbage": Rows("a.jsonl", GOOD + GOOD[:-1] + b" xyz\n", 1, {2: "is not JSON"}),
    "two objects on a line": Rows("a.jsonl", GOOD + GOOD[:-1] + GOOD, 1, {2: "is not JSON"}),
    "byte order mark": Rows("a.jsonl", b"\xef\xbb\xbf" + GOOD, 1, {}),
    "only a byte order mark": Refused("a.jsonl", b"\xef\xbb\xbf", "holds no row at all"),
    "CRLF and blank lines": Rows("a.jsonl", GOOD[:-1] + b"\r\n\r\n  \n" + row(positive=""), 1, {4: "has an empty positive"}),
    "CR alone": Rows("a.jsonl", GOOD + GOOD.replace(b"\n", b"\r") * 2, 1, {2: "is not JSON"}),
    "invalid UTF-8": Rows("a.jsonl", GOOD + b'{"query": "\xff", "positive": "p"}\n', 1, {2: "is not UTF-8"}),
    "Latin-1": Rows("a.jsonl", GOOD + '{"query": "é", "positive": "p"}\n'.encode("latin-1"), 1, {2: "is not UTF-8"}),
    "UTF-16": Refused("a.jsonl", GOOD.decode().encode("utf-16"), "holds UTF-16 data"),
    "null bytes": Rows("a.jsonl", GOOD + b"\0" * 4096 + b"\n", 1, {2: "is not JSON"}),
    "half a surrogate in the query": Rows(
        "a.jsonl", row(query="\ud83d") + GOOD, 1, {1: "has half a surrogate pair in a query"}
    ),
    "half a surrogate in a negative": Rows(
        "a.jsonl", row(negative="\ude00"), 0, {1: "has half a surrogate pair in a negative"}
    ),
    "deep nesting": Rows("a.jsonl", GOOD + DEEP + b"\n", 1, {2: "is not JSON"}),
    "huge integer": Rows("a.jsonl", GOOD + b'{"query": ' + b"9" * 10_000 + b', "positive": "p"}\n', 1, {2: "is not JSON"}),
    "number as query": Rows("a.jsonl", GOOD + row(query=7), 1, {2: "has a query that is not text"}),
    "truth value as positive": Rows("a.jsonl", GOOD + row(positive=True), 1, {2: "has a positive that is not text"}),
    "null query": Rows("a.jsonl", GOOD + row(query=None), 1, {2: "has no query"}),
    "no positive key": Rows("a.jsonl", GOOD + b'{"query": "q"}\n', 1, {2: "has no positive passage"}),
    "empty list of positives": Rows("a.jsonl", GOOD + b'{"query": "q", "positives": []}\n', 1, {2: "has no positive passage"}),
    "empty query": Rows("a.jsonl", GOOD + row(query=""), 1, {2: "has an empty query"}),
    "white space as query": Rows("a.jsonl", GOOD + row(query=" \u00a0\t"), 1, {2: "has an empty query"}),
    "empty negative": Rows("a.jsonl", GOOD + row(negatives=["n", ""]), 1, {2: "has an empty negative"}),
    "list with a null": Rows("a.jsonl", GOOD + row(negatives=["n", None]), 1, {2: "has a negative that is not text"}),
    "object as passage": Rows("a.jsonl", GOOD + row(negatives=[{"text": "n"}]), 1, {2: "has a negative that is not text"}),
    "passage without text": Rows(
        "a.jsonl", GOOD + row(negative_passages=[{"title": "t"}]), 1, {2: "has a negative that is not text"}
    ),
    "list as row": Rows("a.jsonl", GOOD + b'["q", "p"]\n', 1, {2: "is not a JSON object"}),
    "both names of the query": Rows("a.jsonl", GOOD + row(anchor="a"), 1, {2: "has both query and anchor"}),
    "key twice": Rows("a.jsonl", GOOD + b'{"query": "a", "query": "b", "positive": "p"}\n', 1, {2: "has a key twice"}),
    "huge text": Rows("a.jsonl", GOOD + row(positive="x" * (MAX_TEXT_BYTES + 1)), 1, {2: "has a positive of more than 1 MiB"}),
    "largest text": Rows("a.jsonl", row(positive="x" * MAX_TEXT_BYTES), 1, {}),
    "huge line": Rows("a.jsonl", GOOD + row(positive="x" * 2**27) + GOOD, 2, {2: "is a line of 64 MiB or more"}),
    "scores for fewer passages": Rows(
        "a.jsonl", GOOD + row(negatives=["a", "b", "c"], scores=[1, 2]), 1, {2: "has another number of scores than of passages"}
    ),
    "NaN as score": Rows(
        "a.jsonl", GOOD + b'{"query": "q", "positive": "p", "scores": [NaN]}\n', 1, {2: "has scores that are not"}
    ),
    "score too large": Rows("a.jsonl", row(scores=[10**400]), 0, {1: "has scores that are not"}),
    "text as scores": Rows("a.jsonl", row(scores="high"), 0, {1: "has scores that are not"}),
    "empty file": Refused("a.jsonl", b"", "holds no row at all"),
    "only blank lines": Refused("a.jsonl", b"\n \n", "holds no row at all"),
    # JSON arrays
    "array": Rows("a.json", b"[" + GOOD + b"," + row(query=1) + b"]", 1, {2: "has a query that is not text"}),
    "array cut off": Refused("a.json", b"[" + GOOD + b"," + GOOD[:9], "is no whole JSON array"),
    "array of invalid UTF-8": Refused("a.json", b'["\xff"]', "is no whole JSON array"),
    "array too deep": Refused("a.json", DEEP, "is no whole JSON array"),
    # compressed
    "gzip": Rows("a.jsonl.gz", gzip.compress(GOOD + b"x\n" + GOOD), 2, {2: "is not JSON"}),
    "gzip in two parts": Rows("a.jsonl.gz", gzip.compress(GOOD) + gzip.compress(GOOD), 2, {}),
    "truncated gzip": Refused("a.jsonl.gz", gzip.compress(MANY)[:-5000], "cannot be read past line"),
    "gzip without its end": Refused("a.jsonl.gz", gzip.compress(GOOD)[:-8], "cannot be read past line"),
    "garbage after gzip": Refused("a.jsonl.gz", gzip.compress(GOOD) + b"garbage", "cannot be read past line"),
    "damaged gzip": Refused(
        "a.jsonl.gz", gzip.compress(MANY)[:9000] + b"\0" * 99 + gzip.compress(MANY)[9099:], "cannot be read"
    ),
    "empty gzip": Refused("a.jsonl.gz", b"", "is empty, which no gzip file is"),
    "gzip of nothing": Refused("a.jsonl.gz", gzip.compress(b""), "holds no row at all"),
    "plain text named gzip": Refused("a.jsonl.gz", GOOD, "cannot be read"),
    "gzip named plain": Refused("a.jsonl", gzip.compress(GOOD), "holds gzip data"),
    "gzip of gzip": Refused("a.jsonl.gz", gzip.compress(gzip.compress(GOOD)), "holds gzip data"),
    "zstd": Rows("a.jsonl.zst", compressed("zstd"), 3, {}),
    "truncated zstd": Refused("a.jsonl.zst", compressed("zstd", MANY)[:-3], "cannot be read past line"),
    "bzip2": Rows("a.csv.bz2", bz2.compress(b"query,positive\nq,p\n"), 1, {}),
    "truncated bzip2": Refused("a.jsonl.bz2", bz2.compress(GOOD)[:-3], "cannot be read past line"),
    "lz4": Rows("a.jsonl.lz4", compressed("lz4"), 3, {}),
    # CSV
    "CSV": Rows(
        "a.csv", b'anchor,positive,negative_1,negative_2\r\n"a, b","two\nlines",n,\r\n\r\n,p,n,n\r\n', 1, {5: "has no query"}
    ),
    "CSV with a byte order mark": Rows("a.csv", b"\xef\xbb\xbfquery,positive\nq,p\n", 1, {}),
    "CSV of invalid UTF-8": Rows("a.csv", b"query,positive\nq,p\n\xff,p\n", 1, {3: "is not UTF-8"}),
    "CSV with invalid UTF-8 elsewhere": Rows("a.csv", b"query,positive,note\nq,p,\xff\n", 1, {}),
    "CSV row too short": Rows("a.csv", b"query,positive,negative\nq,p,n\nq,p\n", 1, {3: "has another number of cells"}),
    "CSV row too long": Rows("a.csv", b"query,positive\nq,p\nq,p,x\n", 1, {3: "has another number of cells"}),
    "CSV with a stray quote": Rows("a.csv", b'query,positive\n"q"x,p\nq,p\n', 1, {2: "is not CSV"}),
    "CSV with an open quote": Refused(
        "a.csv", b'query,positive\nq,p\nq,"p\nq,p\n', "line 3 opens a quote that is never closed"
    ),
    "CSV with NaN for a text": Rows("a.csv", b"query,positive\nNaN,p\n", 1, {}),
    "CSV with NaN for scores": Rows(
        "a.csv", b'query,positive,scores\nq,p,[NaN]\nq,p,"[1]"\n', 1, {2: "has scores that are not"}
    ),
    "CSV with text for a list": Rows("a.csv", b"query,positives\nq,p\n", 0, {2: "has a column of plural name"}),
    "CSV without a query column": Refused("a.csv", b"question,positive\nq,p\n", "has no column query"),
    "CSV without a positive column": Refused("a.csv", b"query,answer\nq,p\n", "has no column positive"),
    "CSV with a column twice": Refused("a.csv", b"query,positive,query\nq,p,r\n", "has the column query twice"),
    "CSV of a header alone": Refused("a.csv", b"query,positive\n", "holds no row at all"),
    "empty CSV": Refused("a.csv", b"", "holds no row at all"),
    # Parquet and Arrow
    "Parquet": Rows("a.parquet", table(), 2, {}),
    "Parquet with other columns": Rows("a.parquet", table(when=pa.array([2**62, 1], pa.timestamp("us"))), 2, {}),
    "Parquet with nulls": Rows("a.parquet", table(positive=["p", None]), 1, {2: "has no positive passage"}),
    "Parquet of numbers": Rows("a.parquet", table(query=[1, 2]), 0, {1: "has a query that is not text", 2: "has a query that"}),
    "Parquet of bytes": Rows(
        "a.parquet", table(query=[b"q", b"q"]), 0, {1: "has a query that is not text", 2: "has a query that"}
    ),
    "Parquet of lists in lists": Rows(
        "a.parquet",
        table(negatives=[[["n"]], [[]]]),
        0,
        {1: "has a negative that is not text", 2: "has a negative that is not"},
    ),
    "Parquet of structs": Rows(
        "a.parquet", table(query=[{"a": 1}, None]), 0, {1: "has a query that is not text", 2: "has no query"}
    ),
    "Parquet of invalid UTF-8": Rows("a.parquet", table(query=strings(b"q", b"\xff")), 1, {2: "is not UTF-8"}),
    "Parquet without a positive column": Refused("a.parquet", parquet(pa.table({"query": ["q"]})), "has no column positive"),
    "Parquet with a column twice": Refused("a.parquet", parquet(TWICE), "has the column query twice"),
    "truncated Parquet": Refused("a.parquet", table()[:-20], "cannot be read past row 0"),
    "damaged Parquet": Refused("a.parquet", table()[:4] + b"\xff" * 60 + table()[64:], "cannot be read past row 0"),
    "empty Parquet": Refused("a.parquet", b"", "cannot be read past row 0"),
    "Parquet without rows": Refused("a.parquet", parquet(pa.table({"query": [], "positive": []})), "holds no row at all"),
    "JSON named Parquet": Refused("a.parquet", GOOD * 9, "cannot be read past row 0"),
    "Parquet named JSON": Refused("a.jsonl", table(), "holds Parquet data"),
    "Arrow": Rows("a.arrow", stream(end=True), 2, {}),
    "truncated Arrow": Refused("a.arrow", stream(end=False), "does not end as an Arrow stream must"),
    "Arrow with an offset outside": Refused(
        "a.arrow",
        stream(end=True).replace(np.array([0, 2, 4], np.int32).tobytes(), np.array([0, 2, 2**30], np.int32).tobytes()),
        "cannot be read past row 0",
    ),
    "Arrow of invalid UTF-8": Rows("a.arrow", stream(end=True).replace(b"q1q2", b"q1\xff2"), 1, {2: "is not UTF-8"}),
    "zip named JSON": Refused("a.json", b"PK\x03\x04" + bytes(99), "holds zip data"),
    "unknown kind": Refused("a.xlsx", b"x", "is none of .jsonl"),
}


def test_the_table_is_long() -> None:
    assert len(CASES) >= 25


@pytest.mark.parametrize("name", CASES)
def test_no_row_is_lost_in_silence(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    file = tmp_path / case.name
    file.write_bytes(case.content)
    job = make_job(tmp_path, file)
    if isinstance(case, Refused):
        with pytest.raises(DataError) as caught:
            read_sources(job)
        assert case.message in str(caught.value)
        assert str(file) in str(caught.value)
        return
    if case.accepted:
        (source,) = read_sources(job)
        assert len(source.pairs) == len(list(source.pairs)) == case.accepted
        assert sum(source.rejected.values()) == len(case.rejected)
    else:
        with pytest.raises(DataError, match=f"holds no usable row; all {len(case.rejected)} were left out"):
            read_sources(job)
    listed = rejects_of(tmp_path)
    assert {r["row"]: r["reason"] for r in listed}.keys() == case.rejected.keys()
    for rejected in listed:
        assert rejected["reason"].startswith(case.rejected[rejected["row"]])
        assert rejected["file"] == str(file)
        assert len(rejected["start"]) <= 200


CUT = {
    "a.jsonl.gz": gzip.compress(GOOD * 50),
    "a.jsonl.zst": compressed("zstd"),
    "a.jsonl.bz2": bz2.compress(GOOD * 50),
    "a.csv.lz4": compressed("lz4", b"query,positive\nq,p\n"),
    "a.json": b"[" + b",".join([GOOD] * 3) + b"]",
    "a.parquet": table(),
    "a.arrow": stream(end=True),
}


@pytest.mark.parametrize("name", CUT)
def test_a_file_cut_off_anywhere_is_refused(name: str, tmp_path: Path) -> None:
    file, whole = tmp_path / name, CUT[name]
    file.write_bytes(whole)
    assert list(read_rows(str(file), str(file))), "the control: whole, it is read"
    for length in {*range(1, len(whole), 1 + len(whole) // 200), *range(len(whole) - 16, len(whole))}:
        file.write_bytes(whole[:length])
        with pytest.raises(DataError, match=str(file)):
            list(read_rows(str(file), str(file)))


def empty_folder(folder: Path) -> Path:
    (folder / "x").mkdir()
    return folder / "x"


def folder_named_like_a_file(folder: Path) -> Path:
    (folder / "x.jsonl").mkdir()
    return folder / "x.jsonl"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "x.jsonl")
    return folder / "x.jsonl"


def unreadable_among_good(folder: Path) -> Path:
    (folder / "x").mkdir()
    (folder / "x" / "a.jsonl").write_bytes(GOOD)
    (folder / "x" / "b.jsonl.xz").write_bytes(b"x")
    return folder / "x"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (empty_folder, "matches no data file"),
        (folder_named_like_a_file, "matches no data file"),
        (pipe, "matches no data file"),
        (unreadable_among_good, "is none of"),
        (lambda folder: folder / "missing.jsonl", "matches no data file"),
        (lambda folder: folder / "*.jsonl", "matches no data file"),
    ],
)
def test_a_path_without_usable_files_is_told(make: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    path = make(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        read_sources(make_job(tmp_path, path))
    assert str(path) in str(caught.value)


def test_more_rejects_than_allowed_stop_the_run_and_are_listed(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD * 8 + row(query="") + b"{\n")
    (source,) = read_sources(make_job(tmp_path, file, max_rejected_share=0.2))
    assert len(source.pairs) == 8
    (note,) = source.notes
    assert "2 of 10 rows left out (1 x has an empty query; 1 x is not JSON)" in note
    (tmp_path / "runs" / "t" / "rejects.jsonl").unlink()
    with pytest.raises(DataError, match=r"2 of 10 rows were rejected \(1 x has an empty query; 1 x is not JSON\)") as caught:
        read_sources(make_job(tmp_path, file, max_rejected_share=0.19), publish_rejects=False)
    assert "train.max_rejected_share = 0.19" in str(caught.value)
    assert [r["start"] for r in rejects_of(tmp_path)] == ['{"query": "", "positive": "p"}', "{\n"]
    file.write_bytes(GOOD)
    assert read_sources(make_job(tmp_path, file))[0].notes == ()
    assert rejects_of(tmp_path) == [], "rejects of data that is no longer there"
