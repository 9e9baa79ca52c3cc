"""Parts and the commit: names follow content, and the table changes all at once or not at all."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ullme_ray.embed.commit import Commit, Listing, active_parts, commit
from ullme_ray.embed.parts import (
    ChunkRows,
    Part,
    PartSettings,
    build_part,
    check_column_names,
    count_dead_letters,
    dead_letters_path,
    list_parts,
    open_part,
    parse_part_name,
    remove_dead_letters,
    write_dead_letters,
    write_part,
)
from ullme_ray.embed.reading import DEAD_LETTER_SCHEMA
from ullme_ray.embed.units import InputFile, Unit
from ullme_ray.embed.vacuum import remove_old_files
from ullme_ray.errors import EmbedError, StorageError
from ullme_ray.spec.job import ChunksSpec, EmbedInputSpec, JobSpec
from ullme_ray.table import find_table, open_table
from ullme_ray.vectors import VectorFormat

SPEC = EmbedInputSpec(path="in", id="doc", columns=("lang",))
TYPES = pa.schema([("doc", pa.string()), ("lang", pa.string())])
FLOATS = VectorFormat()
SETTINGS = PartSettings(SPEC, TYPES, "f1", FLOATS)
FILE = InputFile("/in/a.jsonl", "a.jsonl", "v1", "jsonl")


def chunk_rows(vectors: np.ndarray, documents: tuple[int, ...] = (0, 1), chunks: tuple[int, ...] = (0, 0)) -> ChunkRows:
    num_tokens = np.arange(4, 4 + len(vectors), dtype=np.int32)
    return ChunkRows(np.array(documents), np.array(chunks, np.int32), vectors, num_tokens, np.array(documents) == 1)


def make_part(
    folder: Path,
    *,
    path: str = "/in/a.jsonl",
    version: str = "v1",
    settings: PartSettings = SETTINGS,
    scale: float = 1.0,
) -> Part:
    file = replace(FILE, path=path, version=version)
    names = settings.types.names
    good = pa.table({**{name: ["x", "y"] for name in names}, "content_hash": ["h1", "h2"]})
    rows = build_part(good, chunk_rows(vectors=np.eye(2, 3, dtype=np.float32) * scale), FLOATS)
    return write_part(str(folder), "docs", Unit(file, 0, 2, 0), settings, rows)


def commit_parts(folder: Path, *parts: Part, settings: PartSettings = SETTINGS, job_name: str = "docs") -> int:
    wanted = {part.key: part for part in parts}
    done = commit(str(folder), wanted, settings.schema, job_name=job_name, fingerprint=settings.fingerprint)
    return done.version


def test_a_part_is_plain_parquet_with_its_provenance(tmp_path: Path) -> None:
    part = make_part(tmp_path)
    path = tmp_path / part.name
    schema = pq.read_schema(path)
    assert schema.names == ["doc", "chunk", "embedding", "content_hash", "num_tokens", "truncated", "lang"]
    assert schema.field("embedding").type == pa.list_(pa.float32(), 3)
    assert b'"fingerprint": "f1"' in schema.metadata[b"ullme_ray"]
    assert (part.num_rows, part.num_bytes) == (2, path.stat().st_size)
    assert parse_part_name(path.name) == (part.key, part.content)
    before = path.read_bytes()
    assert make_part(tmp_path) == part
    assert path.read_bytes() == before
    ((info,),) = list_parts(str(tmp_path)).values()
    assert (info.path, info.num_bytes) == (str(path), part.num_bytes)


def test_a_damaged_part_is_not_taken_for_done(tmp_path: Path) -> None:
    part = make_part(tmp_path)
    ((info,),) = list_parts(str(tmp_path)).values()
    assert open_part(info) == part
    path = tmp_path / part.name
    path.write_bytes(path.read_bytes()[:-9])
    assert open_part(info) is None


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        (replace(FILE, version="v2"), SETTINGS),
        (FILE, replace(SETTINGS, fingerprint="f2")),
        (FILE, replace(SETTINGS, input=SPEC.model_copy(update={"text": ("title",)}))),
        (FILE, replace(SETTINGS, input=SPEC.model_copy(update={"id": None}))),
        (FILE, replace(SETTINGS, types=pa.schema([("doc", pa.int64()), ("lang", pa.string())]))),
        (FILE, replace(SETTINGS, types=TYPES.append(pa.field("more", pa.string())))),
    ],
)
def test_whatever_changes_a_part_changes_its_version(file: InputFile, settings: PartSettings) -> None:
    assert settings.version_of(file) != SETTINGS.version_of(FILE)


def test_a_moved_pattern_changes_generated_ids_only() -> None:
    renamed = replace(FILE, name="sub/a.jsonl")
    assert SETTINGS.version_of(renamed) == SETTINGS.version_of(FILE)
    generated = replace(SETTINGS, input=SPEC.model_copy(update={"id": None}))
    assert generated.version_of(renamed) != generated.version_of(FILE)


def test_commits_add_replace_and_remove_and_do_nothing_twice(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="holds no embeddings table yet; run `ullme-ray embed`"):
        open_table(str(tmp_path))
    a, b = make_part(tmp_path), make_part(tmp_path, path="/in/b.jsonl")
    assert commit_parts(tmp_path, a, b) == 0
    assert commit_parts(tmp_path, a, b) == 0
    changed = make_part(tmp_path, version="v2")
    assert commit_parts(tmp_path, changed, b) == 1
    assert active_parts(open_table(str(tmp_path))) == {changed.key: changed, b.key: b}
    assert commit_parts(tmp_path, changed) == 2
    table = open_table(str(tmp_path))
    assert table.to_pyarrow_table().num_rows == 2
    table.load_as_version(0)
    assert table.to_pyarrow_table().num_rows == 4


def test_other_columns_change_the_schema_with_the_files(tmp_path: Path) -> None:
    commit_parts(tmp_path, make_part(tmp_path))
    wider = replace(SETTINGS, types=TYPES.append(pa.field("more", pa.string())))
    assert commit_parts(tmp_path, make_part(tmp_path, settings=wider), settings=wider) == 1
    rows = open_table(str(tmp_path)).to_pyarrow_table()
    assert rows.column_names[-1] == "more"
    assert rows.num_rows == 2


def test_a_table_of_another_job_is_left_alone(tmp_path: Path) -> None:
    commit_parts(tmp_path, make_part(tmp_path))
    with pytest.raises(EmbedError, match="belongs to job 'docs', and this is 'other'"):
        commit_parts(tmp_path, make_part(tmp_path, version="v2"), job_name="other")
    assert find_table(str(tmp_path)).version() == 0  # type: ignore[union-attr]


RACER = """
import sys, pickle
from ullme_ray.embed.commit import commit
folder, wanted, schema = pickle.loads(bytes.fromhex(sys.stdin.readline()))
print("ready", flush=True); sys.stdin.readline()
print(commit(folder, wanted, schema, job_name="docs", fingerprint="f1").version)
"""


def test_of_runs_that_commit_the_same_at_once_one_writes_and_the_others_find_nothing_to_do(tmp_path: Path) -> None:
    old = make_part(tmp_path)
    commit_parts(tmp_path, old)
    new, more = make_part(tmp_path, version="v2"), make_part(tmp_path, path="/in/b.jsonl")
    wanted = {new.key: new, more.key: more}
    racers = [
        subprocess.Popen([sys.executable, "-c", RACER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    message = pickle.dumps((str(tmp_path), wanted, SETTINGS.schema)).hex() + "\n"
    for racer in racers:
        assert racer.stdin is not None
        assert racer.stdout is not None
        racer.stdin.write(message)
        racer.stdin.flush()
        assert racer.stdout.readline() == "ready\n"
    versions = [int(racer.communicate("go\n", timeout=60)[0]) for racer in racers]
    assert versions == [1, 1, 1]
    assert active_parts(open_table(str(tmp_path))) == wanted


def test_columns_of_the_table_itself_cannot_be_taken() -> None:
    with pytest.raises(EmbedError, match="embedding is a column that the table has for itself"):
        check_column_names(EmbedInputSpec(path="in", columns=("embedding",)))
    with pytest.raises(EmbedError, match="lang would be in the table twice"):
        check_column_names(EmbedInputSpec(path="in", columns=("lang", "lang")))


def test_planning_loads_no_torch() -> None:
    code = "import sys, ullme_ray.embed; assert 'ray' in sys.modules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_part_made_again_with_other_bits_is_another_object_and_the_first_one_stays_in_the_table(tmp_path: Path) -> None:
    first = make_part(tmp_path)
    commit_parts(tmp_path, first)
    again = make_part(tmp_path, scale=1.0000001)
    assert again.key == first.key
    assert again.name != first.name
    assert commit_parts(tmp_path, again) == 0
    assert active_parts(open_table(str(tmp_path))) == {first.key: first}
    assert {Path(info.path).name for info in list_parts(str(tmp_path))[first.key]} == {first.name, again.name}


def test_parts_of_some_files_are_added_without_touching_others(tmp_path: Path) -> None:
    a, b = make_part(tmp_path), make_part(tmp_path, path="/in/b.jsonl")
    commit_parts(tmp_path, a, b)
    changed = make_part(tmp_path, version="v2")
    done = commit(str(tmp_path), {changed.key: changed}, SETTINGS.schema, job_name="docs", fingerprint="f1", whole=False)
    assert (done.version, done.removed) == (1, {a.key: a})
    assert active_parts(open_table(str(tmp_path))) == {changed.key: changed, b.key: b}


def commit_listed(folder: Path, listing: Listing, *parts: Part, whole: bool = True, fingerprint: str = "f1") -> Commit:
    wanted = {part.key: part for part in parts}
    return commit(str(folder), wanted, SETTINGS.schema, job_name="docs", fingerprint=fingerprint, whole=whole, listing=listing)


@pytest.mark.parametrize("whole", [True, False])
def test_a_run_that_listed_the_corpus_earlier_gives_way_to_one_that_came_in_meanwhile(tmp_path: Path, whole: bool) -> None:
    """The slow run still knows the old version of a file, and another one that is gone now."""
    old, gone = make_part(tmp_path), make_part(tmp_path, path="/in/b.jsonl")
    assert commit_listed(tmp_path, Listing(-1, 1.0), old, gone).is_new
    slow, quick = Listing(0, 2.0), Listing(0, 3.0)
    new = make_part(tmp_path, version="v2")
    assert commit_listed(tmp_path, quick, new) == Commit(1, {old.key: old, gone.key: gone})
    assert commit_listed(tmp_path, slow, old, gone, whole=whole) == Commit(1, {}, is_new=False, newer={new.key: new})
    assert active_parts(open_table(str(tmp_path))) == {new.key: new}


def test_a_run_gives_way_to_no_other(tmp_path: Path) -> None:
    """Neither to one it began after, whatever the clocks say, nor to one that listed earlier, nor to another model's."""
    old, new = make_part(tmp_path), make_part(tmp_path, version="v2")
    commit_listed(tmp_path, Listing(-1, 9.0), old)
    assert commit_listed(tmp_path, Listing(0, 2.0), new).version == 1
    assert commit_listed(tmp_path, Listing(0, 3.0), old).version == 2
    assert commit_listed(tmp_path, Listing(1, 2.5), new, fingerprint="f2").version == 3
    assert commit_listed(tmp_path, Listing(3, 2.5), new) == Commit(3, {}, is_new=False)


def test_the_rows_of_a_document_in_chunks_stand_together(tmp_path: Path) -> None:
    good = pa.table({"doc": ["x", "y"], "lang": ["en", "de"], "content_hash": ["h1", "h2"]})
    part = build_part(good, chunk_rows(np.eye(3, 4, dtype=np.float32), (0, 0, 1), (0, 1, 0)), FLOATS)
    assert part.select(["doc", "chunk", "lang", "content_hash"]).to_pylist() == [
        {"doc": "x", "chunk": 0, "lang": "en", "content_hash": "h1"},
        {"doc": "x", "chunk": 1, "lang": "en", "content_hash": "h1"},
        {"doc": "y", "chunk": 0, "lang": "de", "content_hash": "h2"},
    ]


def test_dead_letters_are_counted_by_name_and_go_with_their_part_alone(tmp_path: Path) -> None:
    keys = [SETTINGS.key_of(Unit(FILE, start, start + 5, 0)) for start in (0, 5, 10)]
    dead = pa.Table.from_pylist([{"file": "a", "row": 1, "id": None, "reason": "r", "raw": ""}] * 3, DEAD_LETTER_SCHEMA)
    for number, key in enumerate(keys):
        write_dead_letters(str(tmp_path), key, dead.slice(0, number))
    assert count_dead_letters(str(tmp_path)) == {keys[1]: 1, keys[2]: 2}
    remove_dead_letters(str(tmp_path), [keys[1]])
    assert count_dead_letters(str(tmp_path)) == {keys[2]: 2}


def test_a_vacuum_removes_old_dead_letters_without_a_part_and_files_left_half_written(tmp_path: Path) -> None:
    job = JobSpec.model_validate(
        {"name": "docs", "storage": str(tmp_path), "model": {"base": "x"}, "embed": {"input": {"path": "in", "id": "doc"}}}
    )
    folder = tmp_path / "docs" / "embeddings"
    part = make_part(folder)
    commit_parts(folder, part)
    dead = pa.Table.from_pylist([{"file": "a", "row": 1, "id": None, "reason": "r", "raw": ""}], DEAD_LETTER_SCHEMA)
    old, young = (SETTINGS.key_of(Unit(FILE, start, start + 5, 0)) for start in (5, 10))
    for key in (part.key, old, young):
        write_dead_letters(str(folder), key, dead)
    half, written, theirs = (
        folder / name for name in (f".{part.name}.{'0' * 32}.tmp", f".{part.name}.{'1' * 32}.tmp", ".x.tmp")
    )
    for path in (half, written, theirs):
        path.write_bytes(b"PAR1")
    long_ago = time.time() - 3600.0 * 24 * 30
    for path in (half, theirs, folder / dead_letters_path(old, 1), folder / dead_letters_path(part.key, 1)):
        os.utime(path, (long_ago, long_ago))
    assert remove_old_files(job) == [dead_letters_path(old, 1)]
    assert count_dead_letters(str(folder)).keys() == {part.key, young}
    assert [path.exists() for path in (half, written, theirs)] == [False, True, True]
    assert remove_old_files(job) == []


def test_other_texts_ways_change_the_recipe_and_other_columns_do_not() -> None:
    more = replace(SETTINGS, types=TYPES.append(pa.field("more", pa.string())))
    assert more.recipe == SETTINGS.recipe
    chunked = SPEC.model_copy(update={"chunks": ChunksSpec(tokens=32, overlap=4)})
    recipes = [
        SETTINGS.recipe,
        replace(SETTINGS, fingerprint="f2").recipe,
        replace(SETTINGS, input=chunked).recipe,
        replace(SETTINGS, vectors=VectorFormat(dims=2)).recipe,
        replace(SETTINGS, vectors=VectorFormat("binary")).recipe,
    ]
    assert len(set(recipes)) == len(recipes)


def test_after_a_large_commit_the_log_has_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And only then; a checkpoint that cannot be written costs a warning, never the commit."""
    from ullme_ray.embed import commit as module

    def part(number: int) -> Part:
        return Part(SETTINGS.key_of(Unit(FILE, number, number + 1, 0)), f"{number:016x}", 1, 100)

    def commit_first(count: int) -> int:
        parts = {p.key: p for p in map(part, range(count))}
        return commit(str(tmp_path), parts, SETTINGS.schema, job_name="docs", fingerprint="f1").version

    def checkpoints() -> list[str]:
        return sorted(path.name[:20] for path in (tmp_path / "_delta_log").glob("*.checkpoint.parquet"))

    monkeypatch.setattr(module, "_CHECKPOINT_CHANGES", 5)
    assert commit_first(6) == 0
    assert checkpoints() == [f"{0:020d}"]
    assert commit_first(8) == 1  # two changes
    assert checkpoints() == [f"{0:020d}"]
    assert commit_first(13) == 2
    assert checkpoints() == [f"{0:020d}", f"{2:020d}"]
    assert len(active_parts(open_table(str(tmp_path)))) == 13

    def broken(path: str) -> None:
        raise StorageError("the store is full")

    monkeypatch.setattr(module, "open_table", broken)
    assert commit_first(20) == 3
    assert "got no checkpoint" in caplog.text
    assert len(active_parts(open_table(str(tmp_path)))) == 20
