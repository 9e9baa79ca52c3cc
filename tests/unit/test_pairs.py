"""Good training data: every format and row shape gives the same pairs, in an order that neither files nor processes decide."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ullme_ray import storage
from ullme_ray.errors import DataError, StorageError
from ullme_ray.pairs import Pair, Source, check_sources, data_fingerprint, read_sources
from ullme_ray.pairs.rows import parse_row
from ullme_ray.spec import JobSpec
from ullme_ray.spec.checks import contradictions
from ullme_ray.train.collate import Example
from ullme_ray.train.data import BatchSampler

ROWS = [
    {"query": f"question {i}", "positive": f"answer {i}\nsecond line, with comma", "negative": f'"wrong" {i}'}
    for i in range(3000)
]
PAIRS = [Pair(r["query"], (r["positive"],), (r["negative"],)) for r in ROWS]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "cache"))
    return storage.cache_folder()


def make_job(folder: Path, *sources: Any, **train: Any) -> JobSpec:
    data = [source if isinstance(source, dict) else {"path": str(source)} for source in sources]
    settings = {"data": data, "objective": "cl", "global_batch_size": 12, "max_steps": 40, **train}
    return JobSpec.model_validate({"name": "t", "storage": str(folder / "runs"), "model": {"base": "m"}, "train": settings})


def read(folder: Path, *sources: Any, **train: Any) -> list[Source]:
    return read_sources(make_job(folder, *sources, **train))


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def csv_bytes(rows: list[dict[str, Any]]) -> bytes:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, **options)
    return sink.getvalue().to_pybytes()


def arrow_file(rows: list[dict[str, Any]]) -> bytes:
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=700)
    return sink.getvalue().to_pybytes()


FILES = {
    "a.jsonl": jsonl(ROWS),
    "a.ndjson": jsonl(ROWS),
    "a.jsonl.gz": gzip.compress(jsonl(ROWS)),
    "a.jsonl.zst": pa.compress(jsonl(ROWS), "zstd", asbytes=True),
    "a.json": json.dumps(ROWS, indent=1).encode(),
    "lines.json": jsonl(ROWS),
    "a.json.bz2": bz2.compress(json.dumps(ROWS).encode()),
    "a.csv": csv_bytes(ROWS),
    "a.CSV.GZ": gzip.compress(csv_bytes(ROWS)),
    "a.parquet": parquet(ROWS, row_group_size=700),
    "zstd.parquet": parquet(ROWS, compression="zstd"),
    "a.arrow": arrow_file(ROWS),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    (source,) = read(tmp_path, tmp_path / name)
    assert list(source.pairs) == PAIRS
    assert [source.pairs[i] for i in (0, 1023, 1024, 2999, -1)] == [PAIRS[i] for i in (0, 1023, 1024, 2999, -1)]
    assert source.pairs[1020:1030] == PAIRS[1020:1030]
    with pytest.raises(IndexError):
        source.pairs[3000]
    assert source.notes == ()


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ({"query": "q", "positive": "p"}, Pair("q", ("p",), ())),
        ({"query": "q", "positives": ["p", "r"], "negatives": ["n", "m"]}, Pair("q", ("p", "r"), ("n", "m"))),
        ({"query": "q", "positive": ["p", "r"], "negative": None}, Pair("q", ("p", "r"), ())),
        ({"anchor": "q", "positive": "p", "negative": "n"}, Pair("q", ("p",), ("n",))),
        (
            {"anchor": "q", "positive": "p"} | {f"negative_{i}": f"n{i}" for i in (10, 2, 1)},
            Pair("q", ("p",), ("n1", "n2", "n10")),
        ),
        (
            {
                "query": "q",
                "positive_passages": [{"docid": "1", "title": "T", "text": "p"}],
                "negative_passages": [{"title": "", "text": "n"}, {"text": "m"}],
            },
            Pair("q", ("T p",), ("n", "m")),
        ),
        ({"query": "q", "positives": ["p", "p"], "negatives": ["n", "p", "n"]}, Pair("q", ("p",), ("n",))),
        ({"query": "q", "positive": "p", "label": 1, "score": "high"}, Pair("q", ("p",), ())),
        ({"query": "q", "positive": "p", "negative": "n", "label": 1}, Pair("q", ("p",), ("n",))),  # a class, not a margin
        ({"query": "q", "positive": "p", "negative": "n", "scores": [3, 1.5]}, Pair("q", ("p",), ("n",), (3.0, 1.5))),
        ({"query": "q", "positive": "p", "negative": "n", "label": 1.5}, Pair("q", ("p",), ("n",), (0.0, -1.5))),
        ({"query": "q", "positive": "p", "negative": "n", "label": [3.0, 1.5]}, Pair("q", ("p",), ("n",), (3.0, 1.5))),
        (
            {"query": "q", "positive": "p", "negative_1": "n", "negative_2": "m", "label": [1.5, -2.0]},
            Pair("q", ("p",), ("n", "m"), (0.0, -1.5, 2.0)),
        ),
        # Scores go with their passages: those of the dropped ones too.
        (
            {"query": "q", "positives": ["p", "p", "r"], "negatives": ["n", "r", "m"], "scores": [1, 2, 3, 4, 5, 6]},
            Pair("q", ("p", "r"), ("n", "m"), (1.0, 3.0, 4.0, 6.0)),
        ),
    ],
)
def test_row_shapes(row: dict[str, Any], pair: Pair) -> None:
    assert parse_row(row) == pair


def test_lists_and_scores_from_columns(tmp_path: Path) -> None:
    rows = [{"query": "q", "positives": ["p", "r"], "negatives": ["n"], "scores": [3.0, 2.0, 1.0]}] * 2
    expected = [Pair("q", ("p", "r"), ("n",), (3.0, 2.0, 1.0))] * 2
    (tmp_path / "a.parquet").write_bytes(parquet(rows))
    cells = [{name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()} for row in rows]
    (tmp_path / "a.csv").write_bytes(csv_bytes(cells))
    margin = b"query,positive,negative,label\nq,p,n,1.5\n"
    (tmp_path / "b.csv").write_bytes(margin)
    assert list(read(tmp_path, tmp_path / "a.parquet")[0].pairs) == expected
    assert list(read(tmp_path, tmp_path / "a.csv")[0].pairs) == expected
    assert list(read(tmp_path, tmp_path / "b.csv")[0].pairs) == [Pair("q", ("p",), ("n",), (0.0, -1.5))]


def test_order_does_not_depend_on_how_rows_are_split_over_files(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_bytes(jsonl(ROWS))
    (whole,) = read(tmp_path, tmp_path / "one.jsonl")
    (tmp_path / "five").mkdir()
    bounds = [0, 1, 900, 900, 2048, 3000]
    for number in (3, 1, 4, 0, 2):  # written in another order than that of their names; part 2 has no row
        part = ROWS[bounds[number] : bounds[number + 1]]
        kind = "parquet" if number == 4 else "jsonl.gz"
        data = parquet(part) if number == 4 else gzip.compress(jsonl(part))
        (tmp_path / "five" / f"part-{number}.{kind}").write_bytes(data)
    for path in (tmp_path / "five", tmp_path / "five" / "part-*"):
        (split,) = read(tmp_path, path)
        assert list(split.pairs) == PAIRS
        assert data_fingerprint([split]) == data_fingerprint([whole])
    walks = [walk_of(tmp_path, path, seed=3) for path in (tmp_path / "one.jsonl", tmp_path / "five")]
    assert walks[0] == walks[1]
    assert walks[0] != walk_of(tmp_path, tmp_path / "five", seed=4)
    # The control: other rows, or the same in another order, are other data.
    for other in (ROWS[::-1], ROWS[:-1], [*ROWS[:-1], {**ROWS[-1], "negative": "x"}]):
        (tmp_path / "other.jsonl").write_bytes(jsonl(other))
        assert data_fingerprint(read(tmp_path, tmp_path / "other.jsonl")) != data_fingerprint([whole])


def walk_of(folder: Path, path: Path, *, seed: int) -> list[Example]:
    job = make_job(folder, path, max_steps=30)
    assert job.train is not None
    sampler = BatchSampler(read_sources(job), job.train, seed=seed)
    return [example for step in range(30) for example in sampler.examples(step, 0, 12)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_row_once_per_epoch_from_disk_on_any_number_of_ranks_and_resumed(world_size: int, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS[:60]))
    job = make_job(tmp_path, tmp_path / "a.jsonl", max_steps=10)
    assert job.train is not None
    per_rank = 12 // world_size
    # Every rank opens the data itself; after step 6 all of them start anew, as a resumed run does.
    ranks = [[BatchSampler(read_sources(job), job.train, seed=3) for _ in range(world_size)] for _ in range(2)]
    walk = [
        example
        for step in range(10)
        for rank, sampler in enumerate(ranks[step > 6])
        for example in sampler.examples(step, rank * per_rank, per_rank)
    ]
    assert walk == walk_of(tmp_path, tmp_path / "a.jsonl", seed=3)[:120]
    for epoch in (walk[:60], walk[60:]):
        assert sorted(example.query for example in epoch) == sorted(pair.query for pair in PAIRS[:60])


def test_known_false_negatives_are_dropped_over_rows_and_sources(tmp_path: Path) -> None:
    first = [
        {"query": "q", "positive": "p1", "negatives": ["n", "p2", "p3"], "scores": [4, 3, 2, 1]},
        {"query": "q", "positive": "p2", "negative": "p1"},
        {"query": "other", "positive": "n", "negatives": ["p1", "p2"]},
    ]
    second = [{"query": "q", "positive": "p3", "negative": "n"}]
    (tmp_path / "a.jsonl").write_bytes(jsonl(first))
    (tmp_path / "b.jsonl").write_bytes(jsonl(second))
    a, b = read(tmp_path, tmp_path / "a.jsonl", tmp_path / "b.jsonl", max_rejected_share=0.0)
    assert list(a.pairs) == [
        Pair("q", ("p1",), ("n",), (4.0, 3.0)),
        Pair("q", ("p2",), ()),
        Pair("other", ("n",), ("p1", "p2")),
    ]
    assert list(b.pairs) == [Pair("q", ("p3",), ("n",))]
    assert a.notes == ("train.data.0: 3 hard negatives dropped that another row of the same query calls positive",)


def test_rows_with_too_few_negatives_are_left_out_where_others_may_not_fill_up(tmp_path: Path) -> None:
    rows = [
        {"query": "q1", "positive": "p", "negatives": ["n", "m"], "scores": [2.0, 1.0, 0.0]},
        {"query": "q2", "positive": "p", "negatives": ["n"], "scores": [2.0, 1.0]},
        {"query": "q3", "positive": "p", "negatives": ["n", "m"]},
    ]
    file = tmp_path / "a.jsonl"
    file.write_bytes(jsonl(rows))

    def queries(source: dict[str, Any] | None = None, **train: Any) -> list[str]:
        (found,) = read(tmp_path, {"path": str(file), **(source or {})}, negatives_per_query=2, max_rejected_share=0.5, **train)
        return [pair.query for pair in found.pairs]

    assert queries() == ["q1", "q2", "q3"]
    assert queries(missing_negatives="reject") == ["q1", "q3"]
    assert queries({"in_batch_negatives": False}) == ["q1", "q3"]
    distill = {"preset": "cl", "distill_weight": 1.0}
    assert queries(objective=distill) == ["q1"]
    listed = [json.loads(line) for line in (tmp_path / "runs" / "t" / "rejects.jsonl").read_text().splitlines()]
    assert [(r["row"], r["reason"].split(",")[0]) for r in listed] == [
        (3, "has no teacher scores"),
        (2, "has fewer hard negatives than train.negatives_per_query"),
    ]
    with pytest.raises(DataError, match="1 of 3 rows were rejected"):
        read(tmp_path, file, negatives_per_query=2, objective=distill, max_rejected_share=0.3)
    (contradiction,) = contradictions(make_job(tmp_path, {"path": "x", "in_batch_negatives": False}, negatives_per_query=0))
    assert contradiction.fields == ("train.data.0.in_batch_negatives", "train.negatives_per_query")


def test_examples_carry_scores_prompts_and_in_batch_negatives_of_their_source(tmp_path: Path) -> None:
    rows = [
        {"query": f"q{i}", "positives": [f"1 p{i}", f"2 p{i}"], "negatives": ["3 n", "4 m", "5 o"], "scores": [1, 2, 3, 4, 5]}
        for i in range(9)
    ]
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    (tmp_path / "b.jsonl").write_bytes(jsonl(rows))
    special = {"path": str(tmp_path / "b.jsonl"), "prompts": {"query": "classify: "}, "in_batch_negatives": False}
    distill = {"preset": "cl", "distill_weight": 1.0}
    for objective in ("cl", distill):
        job = make_job(tmp_path, tmp_path / "a.jsonl", special, negatives_per_query=2, objective=objective)
        assert job.train is not None
        sampler = BatchSampler(read_sources(job), job.train, seed=3)
        seen = set()
        for step in range(40):
            batch = sampler.examples(step, 0, 12)
            seen.add(batch[0].in_batch_negatives)
            for example in batch:
                assert example.in_batch_negatives == batch[0].in_batch_negatives
                assert example.prompts == (None if example.in_batch_negatives else job.train.data[1].prompts)
                expected = tuple(float(passage[0]) for passage in example.passages) if objective is distill else None
                assert example.scores == expected
        assert seen == {True, False}


def test_hugging_face_dataset_folders(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    whole = datasets.Dataset.from_list([{"anchor": r["query"], "positive": r["positive"]} for r in ROWS[:100]])
    expected = [Pair(pair.query, pair.positives, ()) for pair in PAIRS[:100]]
    whole.save_to_disk(tmp_path / "plain", num_shards=3)
    assert list(read(tmp_path, tmp_path / "plain")[0].pairs) == expected
    whole.filter(lambda row: row["anchor"] != "question 7").save_to_disk(tmp_path / "filtered")
    assert len(read(tmp_path, tmp_path / "filtered")[0].pairs) == 99
    splits = datasets.DatasetDict({"train": whole, "test": whole.select(range(5))})
    splits.save_to_disk(tmp_path / "splits")
    (source,) = read(tmp_path, tmp_path / "splits")
    assert list(source.pairs) == expected
    assert source.notes == ("train.data.0: takes the split train of the dataset",)
    assert len(read(tmp_path, tmp_path / "splits" / "test")[0].pairs) == 5
    datasets.DatasetDict({"a": whole, "b": whole}).save_to_disk(tmp_path / "ab")
    with pytest.raises(DataError, match="without a train split; add one of a, b to the path"):
        read(tmp_path, tmp_path / "ab")
    next((tmp_path / "plain").glob("data-00001*")).unlink()
    with pytest.raises(DataError, match=r"lists data-00001-of-00003\.arrow, which is not there"):
        read(tmp_path, tmp_path / "plain")


def test_hub_snapshots_give_their_train_split(tmp_path: Path) -> None:
    hub = tmp_path / "snapshot"
    for folder in ("data", ".cache/huggingface", ".git"):
        (hub / folder).mkdir(parents=True)
    for name in ("README.md", "LICENSE", ".gitattributes", "dataset_infos.json", ".cache/huggingface/x.metadata", ".git/HEAD"):
        (hub / name).write_text("not data")
    (hub / "data" / "train-00001-of-00002.parquet").write_bytes(parquet(ROWS[50:100]))
    (hub / "data" / "train-00000-of-00002.parquet").write_bytes(parquet(ROWS[:50]))
    (hub / "data" / "test-00000-of-00001.parquet").write_bytes(parquet(ROWS[100:]))
    (source,) = read(tmp_path, hub)
    assert list(source.pairs) == PAIRS[:100]
    assert source.notes == ("train.data.0: takes the 2 files of the train split; 1 others are not read",)
    for file in (hub / "data").glob("train*"):
        file.unlink()
    with pytest.raises(DataError, match="holds only test or validation files"):
        check_sources(make_job(tmp_path, hub))
    assert len(read(tmp_path, hub / "data" / "test*")[0].pairs) == 2900, "asked for by name"
    (hub / "data" / "notes.xml").write_text("x")
    with pytest.raises(DataError, match=r"notes\.xml is none of"):
        check_sources(make_job(tmp_path, hub))


def test_data_are_read_once_and_again_when_they_change(tmp_path: Path, own_cache: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(jsonl(ROWS[:10]))
    before = read(tmp_path, file)
    made = {path: path.stat().st_mtime_ns for path in own_cache.rglob("*.arrow")}
    assert len(made) == 1
    assert data_fingerprint(read(tmp_path, file)) == data_fingerprint(before)
    assert {path: path.stat().st_mtime_ns for path in own_cache.rglob("*.arrow")} == made
    file.write_bytes(jsonl(ROWS[:11]))
    after = read(tmp_path, file)
    assert (len(before[0].pairs), len(after[0].pairs)) == (10, 11)
    assert list(before[0].pairs) == PAIRS[:10], "a run under way keeps the rows that it opened"
    assert data_fingerprint(after) != data_fingerprint(before)


def test_a_file_that_changes_while_it_is_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(jsonl(ROWS[:10]))
    from ullme_ray.pairs import store

    def slow(local: str, name: str) -> Any:
        yield from real(local, name)
        file.write_bytes(jsonl(ROWS[:9]))

    real = store.read_rows
    monkeypatch.setattr(store, "read_rows", slow)
    with pytest.raises(DataError, match="changed while it was read"):
        read(tmp_path, file)


READER = """
import sys, tempfile
tempfile.tempdir = sys.argv[1]
from ullme_ray.pairs import data_fingerprint, read_sources
from ullme_ray.spec import parse_job
sources = read_sources(parse_job(sys.argv[2].encode(), source="job"))
print(len(sources[0].pairs), data_fingerprint(sources))
"""


def test_processes_share_one_cache_and_a_killed_one_leaves_nothing(tmp_path: Path, own_cache: Path) -> None:
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(jsonl([{**row, "query": f"{row['query']} {i}"} for i in range(20) for row in ROWS]), 1))
    job = make_job(tmp_path, file)
    command = [sys.executable, "-c", READER, str(own_cache.parent), job.model_dump_json()]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (drafts := list(own_cache.glob("*.partial/draft-0.arrow"))) or not drafts[0].stat().st_size:
        assert time.monotonic() < deadline
        assert killed.poll() is None, "it was to be killed at work"
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert [path.name for path in own_cache.glob("pairs-*") if path.is_dir() and path.suffix != ".partial"] == []
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [reader.communicate(timeout=240)[0] for reader in readers]
    assert len(set(answers)) == 1
    assert answers[0].startswith("60000 ")
    (folder,) = [path for path in own_cache.glob("pairs-*") if path.is_dir()]
    assert sorted(path.name for path in folder.iterdir()) == ["rejects.jsonl", "source-0.arrow", "sources.json"]


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS[:10]))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match=r"No space left on device.*set TMPDIR to a larger disk"):
        read(tmp_path, tmp_path / "a.jsonl")
    monkeypatch.undo()
    assert [path for path in own_cache.iterdir() if path.is_dir()] == []
