"""What each kind of input is made of: row groups, groups of plain texts, Delta tables, generated ids, and duplicate ids."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from ullme_ray import storage
from ullme_ray.embed import reading
from ullme_ray.embed.listing import list_input
from ullme_ray.embed.planning import plan_units, split_file
from ullme_ray.embed.units import InputFile, Unit
from ullme_ray.errors import EmbedError
from ullme_ray.spec.job import JobSpec


def job_for(path: Path, folder: Path, *, rows_per_unit: int = 4, **given: Any) -> JobSpec:
    embed = {"input": {"path": str(path), **given}, "rows_per_unit": rows_per_unit}
    return JobSpec.model_validate({"name": "c", "storage": str(folder / "runs"), "model": {"base": "x"}, "embed": embed})


def read_units(job: JobSpec, units: list[Unit]) -> list[reading.UnitRows]:
    assert job.embed is not None
    types = reading.column_types(units[0].file, job.embed.input)
    return [reading.read_unit(unit, job.embed.input, types) for unit in units]


def ids_and_texts(job: JobSpec) -> dict[str, str]:
    read = read_units(job, plan_units(job))
    ids = [i for unit in read for i in unit.good["id"].to_pylist()]
    texts = [text for unit in read for text in unit.texts]
    assert len(set(ids)) == len(texts) == len(ids)
    return dict(zip(ids, texts))


@pytest.mark.parametrize(
    ("groups", "ends"),
    [
        ([4, 4, 4], [4, 8, 12]),
        ([1, 1, 1, 1, 1], [4, 5]),
        ([3, 3, 3], [3, 6, 9]),
        ([2, 11, 1, 2], [2, 6, 10, 13, 16]),  # a large group is divided and shares no unit with its neighbours
        ([8, 1], [4, 8, 9]),
        ([], [0]),
    ],
)
def test_units_of_parquet_end_where_row_groups_do(tmp_path: Path, groups: list[int], ends: list[int]) -> None:
    rows = pa.table({"id": [str(n) for n in range(sum(groups))], "text": [f"text {n}" for n in range(sum(groups))]})
    if not groups:
        rows = rows.cast(pa.schema([("id", pa.string()), ("text", pa.string())]))
    with pq.ParquetWriter(tmp_path / "c.parquet", rows.schema) as writer:
        start = 0
        for size in groups:
            writer.write_table(rows.slice(start, size), row_group_size=size)
            start += size
    job = job_for(tmp_path / "c.parquet", tmp_path, id="id")
    (file,) = list_input(job)
    units = split_file(file, 4)
    assert [unit.stop for unit in units] == ends
    assert [unit.start for unit in units] == [0, *ends[:-1]]
    read = read_units(job, units)
    assert [i for part in read for i in part.good["id"].to_pylist()] == rows["id"].to_pylist()


def write_rows(path: Path, count: int) -> None:
    rows = [{"id": str(n), "text": f"text {n}"} for n in range(count)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3000)
    elif ".csv" in path.name:
        data = "id,text\n" + "".join(f'{row["id"]},"{row["text"]}"\n' for row in rows)
        path.write_bytes(pa.compress(data.encode(), codec="zstd", asbytes=True))
    else:
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


@pytest.mark.parametrize("name", ["c.jsonl.gz", "c.csv.zst", "c.parquet"])
def test_a_process_goes_through_a_file_once_however_many_units_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_rows(tmp_path / folder / name, 9000)
    one, two = (job_for(tmp_path / folder / name, tmp_path, rows_per_unit=400, id="id") for folder in ("one", "two"))
    units = plan_units(one)
    assert len(units) > 20
    opened: list[str] = []
    open_read = storage.open_read

    def counted(path: str) -> Any:
        opened.append(path)
        return open_read(path)

    def ids_of(job: JobSpec, unit: Unit) -> list[int]:
        assert job.embed is not None
        types = pa.schema([("id", pa.string())])
        return [int(i) for i in reading.read_unit(unit, job.embed.input, types).good["id"].to_pylist()]

    reading.column_types(units[0].file, one.embed.input)  # type: ignore[union-attr]  # the header of a CSV file
    monkeypatch.setattr(storage, "open_read", counted)
    for unit in units[::2] + units[-1:]:  # another process has the others; the last is read twice, as a retry does
        assert ids_of(one, unit) == list(range(unit.start, unit.stop))
    at_most = 2 if name == "c.jsonl.gz" else 3  # a CSV file's header is read for itself
    assert 0 < len(opened) <= at_most
    for unit, other in zip(units[::-1], plan_units(two)):  # the control: backwards and between two files it starts again
        assert ids_of(one, unit) == list(range(unit.start, unit.stop))
        assert ids_of(two, other) == list(range(other.start, other.stop))
    assert len(opened) > 2 * len(units)


def write_texts(folder: Path, count: int) -> None:
    (folder / "deep" / "er").mkdir(parents=True)
    for n in range(count):
        at = folder / ("deep/er" if n % 3 else "")
        (at / f"{n:03}.{'txt' if n % 2 else 'MD'}").write_text(f"document {n}\nwith ümlauts")


def test_plain_texts_are_one_document_each_with_their_path_as_id(tmp_path: Path) -> None:
    write_texts(tmp_path / "in", 40)
    (tmp_path / "in" / "bad.txt").write_bytes(b"\xff")
    job = job_for(tmp_path / "in", tmp_path, rows_per_unit=7)
    found = ids_and_texts(job)
    assert found["deep/er/001.txt"] == "document 1\nwith ümlauts"
    assert found["000.MD"] == "document 0\nwith ümlauts"
    assert len(found) == 40
    units = plan_units(job)
    assert sum(unit.num_rows for unit in units) == sum(file.num_files for file in list_input(job)) == 41
    assert max(unit.num_rows for unit in units) <= 7
    only = ids_and_texts(job_for(tmp_path / "in" / "**" / "*.txt", tmp_path, rows_per_unit=7))
    assert only == {name: text for name, text in found.items() if name.endswith(".txt")}


def test_a_text_that_comes_goes_or_changes_leaves_most_groups_as_they_were(tmp_path: Path) -> None:
    write_texts(tmp_path / "in", 200)
    job = job_for(tmp_path / "in", tmp_path, rows_per_unit=8)

    def groups() -> set[InputFile]:
        found = list_input(job)
        assert len(found) > 200 / 8
        return set(found)

    before = groups()
    assert groups() == before
    (tmp_path / "in" / "deep" / "er" / "100a.txt").write_text("new")
    added = groups()
    assert 0 < len(added - before) <= 3
    (tmp_path / "in" / "deep" / "er" / "100a.txt").unlink()
    assert groups() == before
    (tmp_path / "in" / "003.txt").write_text("changed!")
    changed = groups()
    assert len(changed - before) == 1
    assert {file.key for file in changed} == {file.key for file in before}


def test_a_text_that_changes_after_planning_is_refused(tmp_path: Path) -> None:
    write_texts(tmp_path / "in", 3)
    job = job_for(tmp_path / "in", tmp_path)
    units = plan_units(job)
    (tmp_path / "in" / "000.MD").write_text("another length")
    with pytest.raises(EmbedError, match="changed while it was read"):
        read_units(job, units)


def test_plain_texts_have_no_columns_and_do_not_mix_with_rows(tmp_path: Path) -> None:
    write_texts(tmp_path / "in", 3)
    with pytest.raises(EmbedError, match=r"embed.input.id names column doc, which .* does not have; it has text"):
        read_units(job := job_for(tmp_path / "in", tmp_path, id="doc"), plan_units(job))
    (tmp_path / "in" / "rows.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(EmbedError, match=r"matches plain texts, such as .*000.MD, and files of rows, such as .*rows.jsonl"):
        list_input(job_for(tmp_path / "in", tmp_path))


def test_a_delta_table_is_read_as_its_newest_version(tmp_path: Path) -> None:
    path = tmp_path / "my table"  # with a space, since tables hold paths as URLs
    rows = pa.table({"doc": [1, 2, 3], "text": ["a", "b", "c"], "lang": ["e n", "d/e", "ü"]})
    write_deltalake(path, rows, partition_by=["lang"])
    write_deltalake(path, rows.set_column(0, "doc", pa.array([4, 5, 6])), mode="append")
    DeltaTable(path).delete("doc = 2")
    job = job_for(path, tmp_path, id="doc")
    files = list_input(job)
    assert [file.version for file in files] == [str(Path(file.path).stat().st_size) for file in files]
    read = read_units(job, plan_units(job))
    assert sorted(i for part in read for i in part.good["doc"].to_pylist()) == [1, 3, 4, 5, 6]
    on_disk = list(path.rglob("*.parquet"))
    assert len(on_disk) > len(files)  # the control: the folder holds more than the table
    assert set(ids_and_texts(job_for(path, tmp_path)).values()) == {"a", "b", "c"}


def test_a_folder_that_holds_a_delta_table_is_refused_and_an_unfinished_write_in_it_is_not_read(tmp_path: Path) -> None:
    rows = pa.table({"doc": [1], "text": ["a"]})
    for name in ("in/a.parquet", "in/_temporary/0/b.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        pq.write_table(rows, tmp_path / name)
    assert [file.name for file in list_input(job_for(tmp_path / "in", tmp_path))] == ["a.parquet"]
    write_deltalake(tmp_path / "in" / "t", rows)
    with pytest.raises(EmbedError, match=r"holds a Delta table, .*name the table itself: .*/in/t$"):
        list_input(job_for(tmp_path / "in", tmp_path))


def test_an_empty_delta_table_is_refused(tmp_path: Path) -> None:
    write_deltalake(tmp_path / "t", pa.table({"text": pa.array([], pa.string())}))
    with pytest.raises(EmbedError, match=r"the Delta table .*/t has no rows"):
        list_input(job_for(tmp_path / "t", tmp_path))


def test_duplicate_ids_are_found_over_all_units() -> None:
    units = [pa.array(["a", "b", "c"]), pa.array(["d", "a"]), pa.array([], pa.string()), pa.array(["a", "b", "ü"])]
    hashes = [reading.id_hashes(ids) for ids in units]
    assert [len(part) for part in hashes] == [3, 2, 0, 3]
    assert all(part.dtype == np.uint64 for part in hashes)
    found = reading.find_duplicates(hashes)
    assert found.tolist() == sorted(reading.id_hashes(pa.array(["a", "b"])).tolist())
    assert reading.find_duplicates(hashes[:1]).tolist() == []  # the control: none within one unit
    assert reading.find_duplicates([]).tolist() == []


def test_an_id_has_one_hash_whether_it_is_a_number_or_its_text() -> None:
    as_number = reading.id_hashes(pa.chunked_array([pa.array([7, -1], pa.int64())]))
    assert as_number.tolist() == reading.id_hashes(pa.array(["7", "-1"])).tolist()
    assert as_number[0] != as_number[1]
