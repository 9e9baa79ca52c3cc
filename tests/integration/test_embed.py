"""Batch embedding on a real Ray, into a local folder and into a real S3 store: nothing lost, nothing twice, nothing again."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from s3_server import S3Server

from ullme_ray import ray_data, storage
from ullme_ray.embed import flow, plan_units, preflight, run_embed
from ullme_ray.embed.parts import list_parts
from ullme_ray.embed.pipeline import open_run
from ullme_ray.embed.steps import EmbedActor
from ullme_ray.errors import EmbedError
from ullme_ray.model import open_encoder
from ullme_ray.ray_data import Attempts
from ullme_ray.spec.job import JobSpec
from ullme_ray.table import open_table

pytestmark = pytest.mark.usefixtures("ray_local")

ROWS_PER_UNIT = 6


@dataclass(frozen=True)
class Corpus:
    """A corpus and a table in one store."""

    base: str
    model: str

    def job(self, **actors: int) -> JobSpec:
        return JobSpec.model_validate(
            {
                "name": "docs",
                "storage": f"{self.base}/runs",
                "model": {"base": self.model, "max_tokens": 64, "prompts": {"passage": "a key "}},
                "embed": {
                    "input": {"path": f"{self.base}/in", "id": "id", "text": ["title", "body"], "columns": ["lang"]},
                    "rows_per_unit": ROWS_PER_UNIT,
                    "actors": actors,
                },
            }
        )

    @property
    def table(self) -> str:
        return f"{self.base}/runs/docs/embeddings"

    def write(self, name: str, rows: list[dict[str, Any]]) -> None:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        storage.write_bytes(f"{self.base}/in/{name}", gzip.compress(data) if name.endswith(".gz") else data)

    def dead(self) -> list[dict[str, Any]]:
        found = []
        for info in storage.list_files(f"{self.table}/_dead_letters"):
            with storage.open_read(info.path) as stream:
                found += pq.read_table(stream).to_pylist()
        return found


@pytest.fixture
def corpus(s3: S3Server, tiny_base: str) -> Corpus:
    return Corpus(s3.bucket(f"embed-{os.getpid()}"), tiny_base)


def make_rows(prefix: str, count: int) -> list[dict[str, Any]]:
    """Texts of many lengths, some past the cut, so that units are reordered inside."""
    return [
        {"id": f"{prefix}-{n}", "title": f"bucket {n}", "body": "policy key " * (1 + n * 7 % 40), "lang": "en"}
        for n in range(count)
    ]


def vectors(corpus: Corpus) -> dict[str, np.ndarray]:
    """id -> vector, after checking that no id comes twice."""
    rows = open_table(corpus.table).to_pyarrow_table()
    ids = rows["id"].to_pylist()
    assert len(ids) == len(set(ids))
    return {i: np.asarray(vector, np.float32) for i, vector in zip(ids, rows["embedding"].to_pylist())}


def test_full_run_rerun_crash_and_changes(corpus: Corpus) -> None:
    first, second, third = make_rows("a", 20), make_rows("b", 7), make_rows("c", 3)
    bad: list[dict[str, Any]] = [
        {"id": "bad-1", "title": None},
        {"id": "bad-2", "title": " "},
        {"id": None, "title": "x"},
        {"id": "bad-3", "title": 7},
    ]
    corpus.write("a.jsonl", first)
    corpus.write("deep/b.jsonl.gz", second + bad)
    corpus.write("c.jsonl", third)
    job = corpus.job(min=1, max=2)
    preflight(job)
    assert len(plan_units(job)) == 7

    report = run_embed(job)
    assert (report.files, report.units_total, report.units_embedded, report.version) == (3, 7, 7, 0)
    assert (report.rows, report.rows_embedded, report.rows_reused, report.rows_dead) == (34, 30, 0, 4)
    assert json.loads(storage.read_text(f"{corpus.base}/runs/docs/embed_report.json"))["fingerprint"] == report.fingerprint
    assert {(row["id"], row["reason"]) for row in corpus.dead()} == {
        ("bad-1", "title and body is null"),
        ("bad-2", "title and body is empty"),
        (None, "id is null"),
        ("bad-3", "title is a number, not text"),
    }
    rows = open_table(corpus.table).to_pyarrow_table().to_pylist()
    expected = {row["id"]: row for row in first + second + third}
    assert sorted(row["id"] for row in rows) == sorted(expected)
    encoder = open_encoder(job, device="cpu")
    texts = [f"{expected[row['id']]['title']}\n{expected[row['id']]['body']}" for row in rows]
    tokens = encoder.tokenizer.tokenize(texts, "passage")
    assert [row["num_tokens"] for row in rows] == [len(ids) for ids in tokens.input_ids]
    assert [row["truncated"] for row in rows] == tokens.truncated
    assert {row["truncated"] for row in rows} == {True, False}
    assert {(row["chunk"], row["lang"]) for row in rows} == {(0, "en")}
    assert report.tokens == tokens.num_tokens
    stored = np.array([row["embedding"] for row in rows], np.float32)
    assert (stored * encoder.encode(texts)).sum(axis=1).min() > 0.999999
    assert (stored * encoder.encode(texts, "query")).sum(axis=1).min() < 0.9999  # control: without the prompt it differs
    before = vectors(corpus)

    again = run_embed(job)
    assert (again.units_embedded, again.units_reused, again.tokens, again.version) == (0, 7, 0, 0)
    assert (again.rows, again.rows_reused, again.rows_dead) == (34, 30, 4)

    # What a crash before the commit leaves: parts, some missing, one cut short, and no table.
    parts = sorted(info.path for infos in list_parts(corpus.table).values() for info in infos)
    storage.remove(f"{corpus.table}/_delta_log")
    storage.remove(parts[0])
    storage.write_bytes(parts[3], b"PAR1")
    resumed = run_embed(job)
    assert (resumed.units_embedded, resumed.units_reused, resumed.rows, resumed.rows_dead) == (2, 5, 34, 4)
    after = vectors(corpus)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[i], after[i]) for i in before)

    corpus.write("a.jsonl", [*first[:19], {**first[19], "title": "table"}])
    storage.remove(f"{corpus.base}/in/deep/b.jsonl.gz")
    changed = run_embed(job)
    assert (changed.units_embedded, changed.units_reused, changed.version) == (4, 1, 1)
    assert (changed.rows, changed.rows_embedded, changed.rows_copied, changed.rows_reused) == (23, 1, 19, 3)
    assert (changed.rows_dead, changed.files_changed, changed.files_removed) == (0, 1, 1)
    assert corpus.dead() == []
    now = vectors(corpus)
    assert now.keys() == {row["id"] for row in first + third}
    assert [i for i in now if not np.allclose(now[i], before[i], atol=1e-6)] == ["a-19"]


def test_killed_actors_lose_and_repeat_nothing(tmp_path: Path, tiny_base: str) -> None:
    corpus = Corpus(str(tmp_path), tiny_base)
    corpus.write("a.jsonl", make_rows("a", 360))
    job = corpus.job(min=1, max=1)
    killed: list[int] = []  # parts that were there at each kill
    stop = threading.Event()

    def kill_after_first_part() -> None:
        while not stop.is_set() and not killed:
            num_parts = len(list_parts(corpus.table))
            if num_parts and (victims := embed_actor_pids()):
                for pid in victims:
                    os.kill(pid, signal.SIGKILL)
                killed.append(num_parts)
            time.sleep(0.01)

    killer = threading.Thread(target=kill_after_first_part)
    killer.start()
    try:
        report = run_embed(job)
    finally:
        stop.set()
        killer.join()
    assert killed, "no embed actor was found to kill"
    assert 0 < killed[0] < 60
    assert (report.units_embedded, report.rows_embedded, report.rows_dead) == (60, 360, 0)
    assert vectors(corpus).keys() == {f"a-{n}" for n in range(360)}


def test_units_that_begin_in_one_block_go_to_the_actors_one_by_one(
    tmp_path: Path, tiny_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow, "MOST_BLOCKS", 1)
    corpus = Corpus(str(tmp_path), tiny_base)
    corpus.write("a.jsonl", make_rows("a", 5 * ROWS_PER_UNIT))
    context, plan = open_run(corpus.job(min=2, max=2))
    seen = tmp_path / "actors"
    seen.mkdir()

    class Waiting(EmbedActor):
        """Embeds no unit before the other actor was given one too, which it is not if the units stay together."""

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            (seen / str(os.getpid())).touch()
            deadline = time.monotonic() + 120.0
            while len(list(seen.iterdir())) < 2:
                if time.monotonic() > deadline:
                    raise EmbedError("all units went to one actor")
                time.sleep(0.01)
            return super().__call__(row)

    outcomes = list(flow.run_units(plan.missing, context, flow.Steps(actor=Waiting)))
    assert sorted(outcome.part.key.start for outcome in outcomes) == [unit.start for unit in plan.missing]
    assert sum(outcome.num_embedded for outcome in outcomes) == 5 * ROWS_PER_UNIT


def test_a_model_that_always_kills_its_actor_ends_the_run(
    tmp_path: Path, tiny_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_data, "MAX_ATTEMPTS", 2)
    corpus = Corpus(str(tmp_path), tiny_base)
    corpus.write("a.jsonl", make_rows("a", 6))
    killed: set[int] = set()
    stop = threading.Event()

    def kill_while_loading() -> None:
        while not stop.is_set():
            for pid in embed_actor_pids():
                with contextlib.suppress(OSError):
                    if "libtorch" in Path(f"/proc/{pid}/maps").read_text():
                        os.kill(pid, signal.SIGKILL)
                        killed.add(pid)
            time.sleep(0.01)

    killer = threading.Thread(target=kill_while_loading)
    killer.start()
    try:
        with pytest.raises(EmbedError, match=r"loading the model ended its process 2 times, as a lack of memory does"):
            run_embed(corpus.job(min=1, max=1))
    finally:
        stop.set()
        killer.join()
    assert len(killed) >= 2  # an actor of the test before may still have been there


def test_a_unit_that_always_kills_its_process_is_given_up(tmp_path: Path) -> None:
    attempts = Attempts(flow.STAGE, 3)
    (tmp_path / "begun").touch()

    @ray.remote(num_cpus=1, max_retries=-1)
    def embed(work: str, deadly: bool) -> str:
        with attempts.at(work, shown=f"embedding {work}"):
            if deadly:
                with (tmp_path / "begun").open("a") as file:
                    file.write("x")
                os._exit(1)
            return work

    with pytest.raises(ray.exceptions.RayTaskError) as raised:
        ray.get(embed.remote("bad rows", True))
    assert "embedding bad rows ended its process 3 times" in str(raised.value.cause)
    assert (tmp_path / "begun").read_text() == "xxx"
    assert [ray.get(embed.remote("good rows", False)) for _ in range(5)] == ["good rows"] * 5


def embed_actor_pids() -> list[int]:
    """Embed actors of this process's own Ray, by Ray's process titles."""
    parents, actors = {}, []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            title = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if b"MapWorker" in title and b"EmbedActor" in title:
            actors.append(int(entry.name))
    return [pid for pid in actors if _descends_from(os.getpid(), pid, parents)]


def _descends_from(ancestor: int, pid: int, parents: dict[int, int]) -> bool:
    while pid > 1 and pid != ancestor:
        pid = parents.get(pid, 0)
    return pid == ancestor


def test_a_broken_file_ends_the_run_with_its_name(tmp_path: Path, tiny_base: str) -> None:
    corpus = Corpus(str(tmp_path), tiny_base)
    storage.write_bytes(f"{corpus.base}/in/cut.jsonl.gz", gzip.compress(b'{"id": "1", "title": "x"}\n' * 500)[:-10])
    with pytest.raises(EmbedError, match=r"in/cut.jsonl.gz cannot be read to its end"):
        run_embed(corpus.job())


def test_an_error_inside_the_pipeline_comes_out_as_it_was_raised(tmp_path: Path, tiny_base: str) -> None:
    import pyarrow as pa

    corpus = Corpus(str(tmp_path), tiny_base)
    rows = [{**row, "body": os.urandom(40).hex()} for row in make_rows("a", 20)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, compression="zstd")
    data = bytearray(sink.getvalue())
    data[40:1200] = bytes(1160)  # pages damaged, footer whole: planning cannot see it
    storage.write_bytes(f"{corpus.base}/in/a.parquet", bytes(data))
    assert len(plan_units(corpus.job())) == 4
    with pytest.raises(EmbedError, match=r"in/a.parquet cannot be read to its end"):
        run_embed(corpus.job())
    assert not storage.exists(f"{corpus.table}/_delta_log")


def test_a_corpus_without_one_good_row_is_an_error_and_commits_nothing(tmp_path: Path, tiny_base: str) -> None:
    corpus = Corpus(str(tmp_path), tiny_base)
    corpus.write("a.jsonl", [{"id": "1", "heading": "x"}, {"id": "2", "heading": "y"}])
    with pytest.raises(EmbedError, match=r"none of the 2 rows could be embedded; .*_dead_letters tells why"):
        run_embed(corpus.job())
    assert len(corpus.dead()) == 2
    assert not storage.exists(f"{corpus.table}/_delta_log")


def test_a_pool_that_leaves_no_cpu_for_reading_is_refused(tmp_path: Path, tiny_base: str) -> None:
    corpus = Corpus(str(tmp_path), tiny_base)
    corpus.write("a.jsonl", make_rows("a", 2))
    with pytest.raises(EmbedError, match=r"embed.actors.min = 4 actors of 1 CPUs, and one CPU to read and write, are 5 CPUs"):
        run_embed(corpus.job(min=4, max=4))
