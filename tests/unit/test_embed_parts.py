"""Parts and the commit: names follow content, and the table changes all at once or not at all."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ullme_ray.embed.commit import active_parts, commit
from ullme_ray.embed.parts import (
    Part,
    PartName,
    PartSettings,
    build_part,
    check_column_names,
    list_parts,
    open_part,
    write_part,
)
from ullme_ray.embed.units import InputFile, Unit
from ullme_ray.errors import EmbedError, StorageError
from ullme_ray.spec.job import EmbedInputSpec
from ullme_ray.table import find_table, open_table

SPEC = EmbedInputSpec(path="in", id="doc", columns=("lang",))
TYPES = pa.schema([("doc", pa.string()), ("lang", pa.string())])
SETTINGS = PartSettings(SPEC, TYPES, fingerprint="f1")
FILE = InputFile("/in/a.jsonl", "a.jsonl", "v1", "jsonl")


def make_part(folder: Path, *, path: str = "/in/a.jsonl", version: str = "v1", settings: PartSettings = SETTINGS) -> Part:
    file = replace(FILE, path=path, version=version)
    names = settings.types.names
    good = pa.table({**{name: ["x", "y"] for name in names}, "content_hash": ["h1", "h2"]})
    rows = build_part(good, np.eye(2, 3, dtype=np.float32), [4, 5], [False, True])
    return write_part(str(folder), "docs", Unit(file, 0, 2, 0), settings, rows)


def commit_parts(folder: Path, *parts: Part, settings: PartSettings = SETTINGS, job_name: str = "docs") -> int:
    wanted = {part.name: part for part in parts}
    return commit(str(folder), wanted, settings.schema, job_name=job_name, fingerprint=settings.fingerprint)


def test_a_part_is_plain_parquet_with_its_provenance(tmp_path: Path) -> None:
    part = make_part(tmp_path)
    path = tmp_path / str(part.name)
    schema = pq.read_schema(path)
    assert schema.names == ["doc", "chunk", "embedding", "content_hash", "num_tokens", "truncated", "lang"]
    assert schema.field("embedding").type == pa.list_(pa.float32(), 3)
    assert b'"fingerprint": "f1"' in schema.metadata[b"ullme_ray"]
    assert (part.num_rows, part.num_bytes) == (2, path.stat().st_size)
    assert PartName.parse(path.name) == part.name
    before = path.read_bytes()
    assert make_part(tmp_path) == part
    assert path.read_bytes() == before
    assert list_parts(str(tmp_path)) == {part.name: part.num_bytes}


def test_a_damaged_part_is_not_taken_for_done(tmp_path: Path) -> None:
    part = make_part(tmp_path)
    assert open_part(str(tmp_path), part.name, part.num_bytes) == part
    path = tmp_path / str(part.name)
    path.write_bytes(path.read_bytes()[:-9])
    assert open_part(str(tmp_path), part.name, part.num_bytes) is None


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
    assert active_parts(open_table(str(tmp_path))) == {changed.name: changed, b.name: b}
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
print(commit(folder, wanted, schema, job_name="docs", fingerprint="f1"))
"""


def test_of_runs_that_commit_the_same_at_once_one_writes_and_the_others_find_nothing_to_do(tmp_path: Path) -> None:
    old = make_part(tmp_path)
    commit_parts(tmp_path, old)
    new, more = make_part(tmp_path, version="v2"), make_part(tmp_path, path="/in/b.jsonl")
    wanted = {new.name: new, more.name: more}
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
