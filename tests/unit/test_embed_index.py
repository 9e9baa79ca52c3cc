"""The look-up of known texts: found over all parts, in any order, in chunks; what is not what it seems is embedded again."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from ullme_ray.embed import index
from ullme_ray.embed.index import ContentIndex, Found, _read_entries, _sorted_entries, entries_of, lookup
from ullme_ray.embed.parts import ChunkRows, Part, PartSettings, build_part, write_part
from ullme_ray.embed.units import InputFile, Unit
from ullme_ray.spec.job import EmbedInputSpec
from ullme_ray.vectors import VectorFormat

FLOATS = VectorFormat()
SETTINGS = PartSettings(EmbedInputSpec(path="in", id="doc"), pa.schema([("doc", pa.string())]), "f1", FLOATS)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write(folder: Path, name: str, texts: dict[str, int]) -> Part:
    """A part of these texts, each in so many chunks; every vector tells its text and chunk."""
    documents = np.repeat(np.arange(len(texts)), list(texts.values()))
    chunk = np.concatenate([np.arange(count) for count in texts.values()]).astype(np.int32)
    vectors = np.array([vector(list(texts)[d], c) for d, c in zip(documents, chunk)], np.float32)
    rows = ChunkRows(documents, chunk, vectors, np.full(len(chunk), 7, np.int32), np.zeros(len(chunk), bool))
    good = pa.table({"doc": list(texts), "content_hash": [digest(text) for text in texts]})
    unit = Unit(InputFile(f"/in/{name}", name, "v1", "jsonl"), 0, len(texts), 0)
    return write_part(str(folder), "docs", unit, SETTINGS, build_part(good, rows, FLOATS))


def vector(text: str, chunk: int) -> list[float]:
    return [float(ord(text[0])), float(len(text)), float(chunk)]


def index_over(folder: Path, *parts: tuple[Part, dict[str, int]]) -> tuple[ContentIndex, np.ndarray]:
    pieces = []
    for number, (_, texts) in enumerate(parts):
        hashes = [digest(text) for text, count in texts.items() for _ in range(count)]
        chunks = np.concatenate([np.arange(count) for count in texts.values()])
        pieces.append(entries_of(number, hashes, chunks))
    return ContentIndex(str(folder), tuple(part.name for part, _ in parts), None), _sorted_entries(*pieces)


def test_known_texts_come_with_all_their_chunks_in_the_order_asked(tmp_path: Path) -> None:
    one, two = {"alpha": 1, "beta beta": 3}, {"gamma": 2, "delta": 1}
    content, entries = index_over(tmp_path, (write(tmp_path, "1", one), one), (write(tmp_path, "2", two), two))
    asked = ["gamma", "unknown", "beta beta", "alpha", "gamma"]
    hashes = [digest(text) for text in asked]
    found = Found(content, lookup(entries, hashes))
    assert found.entries["count"].tolist() == [2, 0, 3, 1, 2]
    rows = found.read(hashes)
    assert rows is not None
    assert rows.document.tolist() == [0, 0, 2, 2, 2, 3, 4, 4]
    assert rows.chunk.tolist() == [0, 1, 0, 1, 2, 0, 0, 1]
    assert rows.embedding.tolist() == [vector(asked[d], c) for d, c in zip(rows.document, rows.chunk)]
    assert set(rows.num_tokens.tolist()) == {7}


def test_a_part_that_is_not_what_the_index_says_gives_nothing(tmp_path: Path) -> None:
    texts = {"alpha": 1, "beta": 1}
    part = write(tmp_path, "1", texts)
    content, entries = index_over(tmp_path, (part, texts))
    hashes = [digest("alpha")]
    assert Found(content, lookup(entries, hashes)).read(hashes) is not None
    wrong = entries.copy()
    wrong["row"] = 1 - wrong["row"]  # each text points at the other's row
    assert Found(content, lookup(wrong, hashes)).read(hashes) is None
    wrong["row"] += 5
    assert Found(content, lookup(wrong, hashes)).read(hashes) is None
    index._open_rows.cache_clear()
    (tmp_path / part.name).unlink()
    assert Found(content, lookup(entries, hashes)).read(hashes) is None
    index._open_rows.cache_clear()
    assert Found(replace(content, names=("part-x",)), lookup(entries, hashes)).read(hashes) is None


def test_parts_that_cannot_be_read_know_no_texts(tmp_path: Path) -> None:
    texts = {"alpha": 1, "beta": 1}
    good, bad = write(tmp_path, "1", texts), write(tmp_path, "2", {"gamma": 1})
    (tmp_path / bad.name).write_bytes(b"PAR1")
    names = (good.name, bad.name, "part-that-is-gone.parquet")
    entries = _sorted_entries(_read_entries(str(tmp_path), names, 0))
    assert lookup(entries, [digest(text) for text in ("alpha", "beta", "gamma")])["count"].tolist() == [1, 1, 0]
    assert lookup(_sorted_entries(_read_entries(str(tmp_path), names[1:], 0)), [digest("gamma")])["count"].tolist() == [0]


def test_equal_first_halves_are_told_apart_by_the_second() -> None:
    known, other = "ab" * 8 + "00" * 24, "ab" * 8 + "11" * 24
    entries = _sorted_entries(entries_of(0, [known], np.array([0])))
    assert lookup(entries, [known, other])["count"].tolist() == [1, 0]
