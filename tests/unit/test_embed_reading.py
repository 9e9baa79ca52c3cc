"""Input files: units cover every row once, in every format, and bad rows are told apart from good ones with a reason."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from datetime import datetime
from functools import partial
from pathlib import Path
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import Schema as DeltaSchema

from ullme_ray.embed import reading
from ullme_ray.embed.planning import list_input, plan_units, split_file
from ullme_ray.embed.units import InputFile
from ullme_ray.errors import EmbedError
from ullme_ray.spec.job import EmbedInputSpec, JobSpec

SPEC = EmbedInputSpec(path="unused", id="id", text=("title", "body"), columns=("lang",))


def job_for(pattern: str, folder: Path, **given: object) -> JobSpec:
    embed = {"input": {"path": pattern, **given}, "rows_per_unit": 4}
    return JobSpec.model_validate({"name": "corpus", "storage": str(folder / "runs"), "model": {"base": "x"}, "embed": embed})


def only_file(path: Path) -> InputFile:
    files = list_input(job_for(str(path), path.parent))
    assert len(files) == 1
    return files[0]


def make_rows(count: int) -> list[dict[str, str]]:
    """Texts with line breaks, quotes, commas and letters of several bytes, since rows are found by byte positions."""
    return [
        {"id": f"r{n}", "title": f"Zeile {n} ü", "body": f'a "quoted", line\nand {n} 漢字', "lang": "de"} for n in range(count)
    ]


def write(path: Path, rows: list[dict[str, str]]) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
        return
    stream = io.StringIO(newline="")
    if ".csv" in path.name.lower():
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    else:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    data = stream.getvalue().encode()
    codec = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    path.write_bytes(data if codec is None else packed(data, codec))


def packed(data: bytes, codec: str) -> bytes:
    """In two pieces, as tools that append to a compressed file leave it."""
    pack = gzip.compress if codec == "gzip" else partial(pa.compress, codec=codec, asbytes=True)
    return bytes(pack(data[:100])) + bytes(pack(data[100:]))


@pytest.mark.parametrize("rows_per_unit", [1, 4, 7, 20, 100])
@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "c.ndjson.zst", "c.csv", "c.csv.gz", "C.CSV.zst", "c.parquet"])
def test_units_hold_every_row_once_and_in_order(tmp_path: Path, name: str, rows_per_unit: int) -> None:
    rows = make_rows(20)
    write(tmp_path / name, rows)
    file = only_file(tmp_path / name)
    types = reading.column_types(file, SPEC)
    units = split_file(file, rows_per_unit)
    if file.format != "parquet":
        assert [unit.num_rows for unit in units] == [min(rows_per_unit, 20 - at) for at in range(0, 20, rows_per_unit)]
    assert max(unit.num_rows for unit in units) <= rows_per_unit
    read = [reading.read_unit(unit, SPEC, types) for unit in units]
    assert [text for part in read for text in part.texts] == [f"{row['title']}\n{row['body']}" for row in rows]
    assert [i for part in read for i in part.good["id"].to_pylist()] == [row["id"] for row in rows]
    assert sum(part.dead.num_rows for part in read) == 0


def test_generated_ids_name_file_and_row_below_the_corpus_folder(tmp_path: Path) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    write(tmp_path / "in" / "a" / "x.jsonl", make_rows(5))
    job = job_for(str(tmp_path / "in"), tmp_path, text=["body"])
    units = plan_units(job)
    assert job.embed is not None
    types = reading.column_types(units[0].file, job.embed.input)
    ids = [i for unit in units for i in reading.read_unit(unit, job.embed.input, types).good["id"].to_pylist()]
    assert ids == [f"a/x.jsonl#{n}" for n in range(5)]


def test_parquet_columns_keep_their_types_as_far_as_a_delta_table_can_hold_them(tmp_path: Path) -> None:
    table = pa.table(
        {
            "id": pa.array([1, None], pa.uint32()),
            "title": pa.array(["x", "y"], pa.large_string()),
            "body": pa.nulls(2),
            "lang": pa.array(["en", "en"]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "c.parquet")
    file = only_file(tmp_path / "c.parquet")
    types = reading.column_types(file, SPEC)
    assert types.types == [pa.int64(), pa.string()]
    (unit,) = split_file(file, 10)
    rows = reading.read_unit(unit, SPEC, types)
    assert rows.good.select(["id", "lang"]).to_pylist() == [{"id": 1, "lang": "en"}]
    assert [row["reason"] for row in rows.dead.to_pylist()] == ["id is null"]


def test_times_of_any_zone_are_kept_as_utc(tmp_path: Path) -> None:
    moment = datetime(2026, 7, 1, 12, tzinfo=ZoneInfo("Europe/Berlin"))
    times = pa.array([moment], pa.timestamp("ns", "Europe/Berlin"))
    pq.write_table(pa.table({"id": ["1"], "title": ["x"], "body": ["y"], "lang": times}), tmp_path / "c.parquet")
    file = only_file(tmp_path / "c.parquet")
    types = reading.column_types(file, SPEC)
    assert types.field("lang").type == pa.timestamp("us", "UTC")
    (unit,) = split_file(file, 10)
    rows = reading.read_unit(unit, SPEC, types)
    assert rows.dead.num_rows == 0
    assert rows.good["lang"].to_pylist() == [moment]
    assert DeltaSchema.from_arrow(types)


@pytest.mark.parametrize(
    "kind", [pa.time64("us"), pa.duration("us"), pa.decimal256(50, 2), pa.list_(pa.duration("us"))], ids=str
)
def test_a_column_that_a_delta_table_cannot_hold_is_named_before_any_work(tmp_path: Path, kind: pa.DataType) -> None:
    word = re.findall(r"time64|duration|decimal256", str(kind))[0]
    columns = {"id": ["1"], "title": ["x"], "body": ["y"], "lang": pa.nulls(1, kind)}
    pq.write_table(pa.table(columns), tmp_path / "c.parquet")
    with pytest.raises(EmbedError, match=rf"columns names column lang, which is .*{re.escape(word)}.* in .*; leave it out"):
        reading.column_types(only_file(tmp_path / "c.parquet"), SPEC)


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    write(tmp_path / "c.parquet", [{"id": "1", "text": "x"}])
    with pytest.raises(
        EmbedError, match=r"embed.input.text names column title, which .*c.parquet does not have; it has id, text"
    ):
        reading.column_types(only_file(tmp_path / "c.parquet"), SPEC)


def test_a_file_that_changes_after_planning_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "c.jsonl", make_rows(3))
    file = only_file(tmp_path / "c.jsonl")
    (unit,) = split_file(file, 10)
    write(tmp_path / "c.jsonl", make_rows(3)[::-1])
    with pytest.raises(EmbedError, match="changed while it was read"):
        reading.read_unit(unit, SPEC, reading.column_types(file, SPEC))


def test_an_input_without_files_and_one_with_strangers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EmbedError, match="matches no file"):
        list_input(job_for(str(tmp_path / "*.jsonl"), tmp_path))
    (tmp_path / "slides.pdf").write_text("x")
    with pytest.raises(EmbedError, match=r"slides.pdf; narrow it with a glob"):
        list_input(job_for(str(tmp_path), tmp_path))


def test_an_empty_file_has_one_unit_without_rows(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text("")
    file = only_file(tmp_path / "c.jsonl")
    (unit,) = split_file(file, 10)
    rows = reading.read_unit(unit, SPEC, reading.column_types(file, SPEC))
    assert (unit.num_rows, rows.texts, rows.good.num_rows, rows.dead.num_rows) == (0, [], 0, 0)
