"""The look-up of known texts: found over all parts, in any order, in chunks; what is not what it seems is embedded again."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.exceptions import RayTaskError

from ullme_ray.embed import duplicates, index, node_folder
from ullme_ray.embed.index import ContentIndex, Found, _read_entries, entries_of, lookup, open_sorted, write_sorted
from ullme_ray.embed.parts import ChunkRows, Part, PartSettings, build_part, write_part
from ullme_ray.embed.units import InputFile, Unit
from ullme_ray.errors import EmbedError, StorageError, UllmeError
from ullme_ray.spec.job import EmbedInputSpec
from ullme_ray.vectors import VectorFormat

FLOATS = VectorFormat()
SETTINGS = PartSettings(EmbedInputSpec(path="in", id="doc"), pa.schema([("doc", pa.string())]), "f1", FLOATS)


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    node_folder.node_folder.cache_clear()
    index._open_records.cache_clear()


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
    names = tuple(part.name for part, _ in parts)
    return ContentIndex(str(folder), names, (), sum(map(len, pieces)), "a-run"), sort(folder, *pieces)


def sort(folder: Path, *pieces: np.ndarray, num_rows: int = 0) -> np.ndarray:
    write_sorted(pieces, num_rows, folder / "sorted")
    return open_sorted(folder / "sorted")[1]


def look(entries: np.ndarray, hashes: list[str]) -> np.ndarray:
    return lookup(np.ascontiguousarray(entries["first"]), entries, hashes)


def test_known_texts_come_with_all_their_chunks_in_the_order_asked(tmp_path: Path) -> None:
    one, two = {"alpha": 1, "beta beta": 3}, {"gamma": 2, "delta": 1}
    content, entries = index_over(tmp_path, (write(tmp_path, "1", one), one), (write(tmp_path, "2", two), two))
    asked = ["gamma", "unknown", "beta beta", "alpha", "gamma"]
    hashes = [digest(text) for text in asked]
    found = Found(content, look(entries, hashes))
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
    assert Found(content, look(entries, hashes)).read(hashes) is not None
    wrong = np.array(entries)
    wrong["row"] = 1 - wrong["row"]  # each text points at the other's row
    assert Found(content, look(wrong, hashes)).read(hashes) is None
    wrong["row"] += 5
    assert Found(content, look(wrong, hashes)).read(hashes) is None
    index._open_records.cache_clear()
    (tmp_path / part.name).unlink()
    assert Found(content, look(entries, hashes)).read(hashes) is None
    index._open_records.cache_clear()
    assert Found(replace(content, names=("part-x",)), look(entries, hashes)).read(hashes) is None


def test_parts_that_cannot_be_read_know_no_texts(tmp_path: Path) -> None:
    texts = {"alpha": 1, "beta": 1}
    good, bad = write(tmp_path, "1", texts), write(tmp_path, "2", {"gamma": 1})
    (tmp_path / bad.name).write_bytes(b"PAR1")
    names = (good.name, bad.name, "part-that-is-gone.parquet")
    entries = sort(tmp_path, _read_entries(str(tmp_path), names, 0))
    assert look(entries, [digest(text) for text in ("alpha", "beta", "gamma")])["count"].tolist() == [1, 1, 0]
    assert look(sort(tmp_path, _read_entries(str(tmp_path), names[1:], 0)), [digest("gamma")])["count"].tolist() == [0]


def test_a_part_whose_middle_is_damaged_knows_no_texts(tmp_path: Path) -> None:
    """pyarrow raises a plain OSError for pages that it cannot decompress."""
    texts = {f"{number} is a text of its own": 1 for number in range(500)}
    part = write(tmp_path, "1", texts)
    content, entries = index_over(tmp_path, (part, texts))
    data = bytearray((tmp_path / part.name).read_bytes())
    data[100:-2000] = bytes(len(data) - 2100)
    (tmp_path / part.name).write_bytes(data)
    with pytest.raises(OSError, match=r"."):
        pq.read_table(tmp_path / part.name)
    hashes = [digest(text) for text in texts]
    assert Found(content, look(entries, hashes)).read(hashes) is None
    assert not len(_read_entries(str(tmp_path), (part.name,), 0))
    with pytest.raises(EmbedError, match=rf"{part.name} is damaged .*; put it back"):
        duplicates._ids(str(tmp_path), part.name, "doc")


@pytest.mark.parametrize(
    ("cause", "told"),
    [
        (StorageError("s3://b/t cannot be read"), r"^s3://b/t cannot be read$"),
        (OSError(5, "Input/output error"), r"^the table's parts cannot be read \(\[Errno 5\] Input/output error\)$"),
    ],
)
def test_what_a_task_met_can_be_sent_on_and_does_not_pass_for_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: Exception, told: str
) -> None:
    def failed(reference: object) -> None:
        raise RayTaskError("_read_entries", "a traceback", cause).as_instanceof_cause()

    monkeypatch.setattr(ray, "get", failed)
    with pytest.raises(UllmeError, match=told) as met:
        ContentIndex(str(tmp_path), (), ("a reference",), 1, "a-run").find([digest("x")])
    assert str(pickle.loads(pickle.dumps(met.value))) == str(met.value)


def test_equal_first_halves_are_told_apart_by_the_second(tmp_path: Path) -> None:
    known, other = "ab" * 8 + "00" * 24, "ab" * 8 + "11" * 24
    entries = sort(tmp_path, entries_of(0, [known], np.array([0])))
    assert look(entries, [known, other])["count"].tolist() == [1, 0]


def test_an_index_of_many_buckets_is_one_sorted_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_BUCKET_ENTRIES", 100)
    hashes = [digest(str(number)) for number in range(3000)]
    pieces = [entries_of(n, hashes[n * 500 : (n + 1) * 500], np.zeros(500, np.int32)) for n in range(6)]
    again = entries_of(7, hashes[:10], np.zeros(10, np.int32))
    write_sorted([*pieces, again], 3000, tmp_path / "sorted")
    assert sorted(os.listdir(tmp_path / "sorted")) == ["entries", "keys"]
    keys, entries = open_sorted(tmp_path / "sorted")
    assert len(entries) == 3000, "one entry for each hash"
    assert (np.diff(keys) > 0).all()
    assert (keys == entries["first"]).all()
    found = lookup(keys, entries, [*hashes, digest("another")])
    assert found["count"].tolist() == [1] * 3000 + [0]
    assert (found["part"][:3000] * 500 + found["row"][:3000]).tolist() == list(range(3000))


def test_a_shuffled_corpus_decodes_every_part_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [{f"{chr(97 + part)} {n}": 1 + n % 2 for n in range(4)} for part in range(12)]
    content, entries = index_over(tmp_path, *((write(tmp_path, str(n), own), own) for n, own in enumerate(texts)))
    every = [text for own in texts for text in own]
    np.random.default_rng(1).shuffle(every)
    decoded: list[str] = []
    decode = index._decode

    def counted(path: str) -> np.ndarray:
        decoded.append(path)
        return decode(path)

    monkeypatch.setattr(index, "_decode", counted)
    for unit in (every[:24], every[24:]):
        hashes = [digest(text) for text in unit]
        rows = Found(content, look(entries, hashes)).read(hashes)
        assert rows is not None
        assert rows.embedding.tolist() == [vector(unit[d], c) for d, c in zip(rows.document, rows.chunk)]
        assert sorted(set(rows.document.tolist())) == list(range(24))
    assert len(decoded) == len(set(decoded)) == 12

    monkeypatch.setattr(index, "has_room", lambda *_: False)  # the control: without room on disk each unit decodes all
    other = replace(content, run="another")
    for _ in range(2):
        assert Found(other, look(entries, hashes)).read(hashes) is not None
    assert len(decoded) == 12 + 2 * 12


def test_a_damaged_part_among_many_is_not_found_and_the_others_are(tmp_path: Path) -> None:
    parts = [(write(tmp_path, str(n), {f"text {n}": 1}), {f"text {n}": 1}) for n in range(10)]
    content, entries = index_over(tmp_path, *parts)
    (tmp_path / parts[3][0].name).write_bytes(b"PAR1")
    hashes = [digest(f"text {n}") for n in range(10)]
    rows = Found(content, look(entries, hashes)).read(hashes)
    assert rows is not None
    assert rows.document.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]


def _use(temporary: str, run: str, ready: object, go_on: object) -> None:
    tempfile.tempdir = temporary
    (node_folder.node_folder(run) / "file").write_text("kept")
    ready.set()  # type: ignore[attr-defined]
    go_on.wait(60)  # type: ignore[attr-defined]


def test_what_a_killed_run_left_goes_and_what_is_in_use_stays(own_temporary_folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, go_on = context.Event(), context.Event()
    process = context.Process(target=_use, args=(str(own_temporary_folder), "one", ready, go_on))
    process.start()
    assert ready.wait(60)
    file = own_temporary_folder / "ullme_ray-embed-one" / "file"
    node_folder.node_folder("two")
    assert file.read_text() == "kept"
    process.kill()
    process.join()
    node_folder.node_folder("three")
    assert not file.parent.exists()
    assert (own_temporary_folder / "ullme_ray-embed-two").exists(), "this process lives"
    node_folder.remove_node_folder("two")
    assert not (own_temporary_folder / "ullme_ray-embed-two").exists()
