"""The nightly run: only new texts go to the model, whatever became of the files they stand in."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from ullme_ray import storage
from ullme_ray.embed import describe_table, dry_run, pipeline, remove_old_files, run_embed, verify_table
from ullme_ray.errors import EmbedError
from ullme_ray.model import open_tokenizer
from ullme_ray.spec.job import JobSpec
from ullme_ray.table import open_table

pytestmark = pytest.mark.usefixtures("ray_local")

NUM_ROWS = 200


def make_job(folder: Path, base: str, **changes: Any) -> JobSpec:
    embed: dict[str, Any] = {
        "input": {"path": f"{folder}/in", "id": "id", "columns": ["lang"]},
        "rows_per_unit": 16,
        "price_per_hour": 3.6,
    }
    model: dict[str, Any] = {"base": base, "max_tokens": 48}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        {"model": model, "embed": embed, "input": embed["input"]}[section][name] = value
    return JobSpec.model_validate({"name": "docs", "storage": f"{folder}/runs", "model": model, "embed": embed})


def make_rows(count: int = NUM_ROWS, *, start: int = 0) -> list[dict[str, Any]]:
    return [{"id": f"d{n}", "text": f"row {n} " + "bucket key " * (n % 9), "lang": "en"} for n in range(start, start + count)]


def write_files(folder: Path, rows: list[dict[str, Any]], num_files: int, prefix: str) -> None:
    """The whole corpus anew, in files of other names and sizes."""
    storage.remove(f"{folder}/in")
    size = -(-len(rows) // num_files)
    for number in range(num_files):
        lines = "".join(json.dumps(row) + "\n" for row in rows[number * size : (number + 1) * size])
        storage.write_text(f"{folder}/in/{prefix}-{number}.jsonl", lines)


def read(folder: Path) -> dict[str, tuple[str, list[float]]]:
    """id -> (content hash, vector) of tables with one chunk a document; ids are unique."""
    rows = open_table(f"{folder}/runs/docs/embeddings").to_pyarrow_table().to_pylist()
    found = {row["id"]: (row["content_hash"], row["embedding"]) for row in rows}
    assert len(found) == len(rows)
    return found


def tokens_of(job: JobSpec, rows: list[dict[str, Any]]) -> int:
    return open_tokenizer(job).tokenize([row["text"] for row in rows], "passage").num_tokens


@pytest.mark.parametrize("anew", [True, False], ids=["all files anew", "in the same files"])
def test_a_corpus_with_some_rows_changed_new_and_removed_costs_those_alone(tmp_path: Path, tiny_base: str, anew: bool) -> None:
    """5 % of the rows changed, 3 % new, 2 % removed."""
    job = make_job(tmp_path, tiny_base)
    rows = make_rows()
    write_files(tmp_path, rows, 3, "monday")
    first = run_embed(job)
    assert (first.rows_embedded, first.tokens) == (NUM_ROWS, tokens_of(job, rows))
    assert first.cost_per_million_rows == pytest.approx(first.seconds / 1000 / NUM_ROWS * 1e6)
    assert first.mfu is not None
    assert 0 < first.mfu < 1
    before = read(tmp_path)

    chance = random.Random(1)
    picked = chance.sample(range(NUM_ROWS), 14)
    changed = {n: {**rows[n], "text": rows[n]["text"] + " changed"} for n in picked[:10]}
    new = make_rows(6, start=NUM_ROWS)
    tuesday = [changed.get(n, row) for n, row in enumerate(rows) if n not in picked[10:]] + new
    if anew:
        chance.shuffle(tuesday)
        write_files(tmp_path, tuesday, 5, "tuesday")  # other names, order and sizes, as a nightly export does
    else:
        write_files(tmp_path, tuesday, 3, "monday")
    planned = dry_run(job)
    assert (planned.files_new, planned.files_changed, planned.files_removed) == ((5, 0, 3) if anew else (0, 3, 0))
    assert planned.rows_to_read == len(tuesday)
    assert 0 < planned.rows_to_embed_estimate < 60
    second = run_embed(job)
    assert (second.rows_embedded, second.rows_copied, second.rows) == (16, len(tuesday) - 16, len(tuesday))
    assert second.tokens == tokens_of(job, [*changed.values(), *new])
    assert (second.files_new, second.files_changed, second.files_removed) == ((5, 0, 3) if anew else (0, 3, 0))
    after = read(tmp_path)
    assert after.keys() == {row["id"] for row in tuesday}
    same = before.keys() & after.keys() - {row["id"] for row in changed.values()}
    assert len(same) == NUM_ROWS - 14
    assert all(after[i] == before[i] for i in same)
    assert all(after[row["id"]][0] != before[row["id"]][0] for row in changed.values())

    touched = swap_texts_unseen(tmp_path)
    third = run_embed(job)
    assert (third.units_embedded, third.tokens, third.rows_reused, third.version) == (0, 0, len(tuesday), second.version)
    touched()
    assert verify_table(job, num_rows=40).rows == 40


def swap_texts_unseen(folder: Path) -> Callable[[], None]:
    """Other texts in all files, whose size and time stay: a run that reads them would find news. Gives what undoes it."""
    files = {path: (path.read_bytes(), path.stat()) for path in (folder / "in").iterdir()}

    def write(swap: bool) -> None:
        for path, (data, stat) in files.items():
            path.write_bytes(data.replace(b"row ", b"ROW ") if swap else data)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            assert path.stat().st_size == len(data)

    write(swap=True)
    return lambda: write(swap=False)


def test_whatever_changes_a_vector_embeds_all_again(tmp_path: Path, tiny_base: str) -> None:
    """One change after another, each beside those before it; every setting alone: test_encoder.py, test_embed_parts.py."""
    write_files(tmp_path, make_rows(20), 1, "a")
    run_embed(make_job(tmp_path, tiny_base))
    changes: list[dict[str, Any]] = [
        {"model__prompts": {"passage": "a key "}, "model__pooling": "lasttoken", "model__max_tokens": 16},
        {"model__base": with_one_other_weight(tiny_base, tmp_path / "other")},
        {"input__chunks": {"tokens": 8, "overlap": 2}, "embed__output": {"dims": 16, "dtype": "int8"}},
    ]
    settings: dict[str, Any] = {}
    for change in changes:
        settings |= change
        job = make_job(tmp_path, tiny_base, **settings)
        report = run_embed(job)
        assert (report.rows_embedded, report.rows_copied, report.rows_reused) == (20, 0, 0), change
        assert report.tokens == int(pa.compute.sum(open_table(report.table).to_pyarrow_table()["num_tokens"]).as_py())
        assert report.files_changed == 1
        assert verify_table(job, num_rows=10).lowest_cosine > 0.99999, change


def with_one_other_weight(base: str, folder: Path) -> str:
    """The model with a thousandth added to one number of its embeddings."""
    shutil.copytree(base, folder)
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"][5, 0] += 1e-3
    save_file(weights, path, metadata={"format": "pt"})
    return str(folder)


def test_equal_texts_are_embedded_once_and_long_ones_in_chunks(tmp_path: Path, tiny_base: str) -> None:
    texts = ["same text", "bucket key value " * 12, "same text", "short", "bucket key value " * 12]
    rows = [{"id": str(n), "text": text, "lang": "en"} for n, text in enumerate(texts)]
    write_files(tmp_path, rows, 1, "a")
    job = make_job(tmp_path, tiny_base, input__chunks={"tokens": 10, "overlap": 2})
    report = run_embed(job)
    stored = open_table(report.table).to_pyarrow_table().to_pylist()
    by_id = {str(n): [row for row in stored if row["id"] == str(n)] for n in range(5)}
    assert [row["chunk"] for row in by_id["1"]] == list(range(len(by_id["1"])))
    assert len(by_id["1"]) > 2
    assert [row["embedding"] for row in by_id["4"]] == [row["embedding"] for row in by_id["1"]]
    assert by_id["0"][0]["embedding"] == by_id["2"][0]["embedding"] != by_id["3"][0]["embedding"]
    assert (report.rows, report.rows_embedded, report.table_rows) == (5, 5, len(stored))
    assert report.tokens == sum(row["num_tokens"] for i in ("0", "1", "3") for row in by_id[i])

    write_files(tmp_path, rows[::-1], 1, "b")
    moved = run_embed(job)
    assert (moved.rows_copied, moved.tokens) == (5, 0)
    again = open_table(report.table).to_pyarrow_table().sort_by([("id", "ascending"), ("chunk", "ascending")]).to_pylist()
    assert again == sorted(stored, key=lambda row: (row["id"], row["chunk"]))


def test_ids_that_stand_for_two_rows_are_told_and_kept(tmp_path: Path, tiny_base: str) -> None:
    rows = [*make_rows(40), {"id": "d7", "text": "another", "lang": "de"}]
    write_files(tmp_path, rows, 2, "a")
    report = run_embed(make_job(tmp_path, tiny_base))
    assert (report.duplicate_ids, report.duplicate_examples, report.table_rows) == (1, ("d7",), 41)
    assert "1 ids stand for more than one row, such as d7" in report.to_text()


def test_they_are_told_too_where_the_run_before_ended_at_its_commit(
    tmp_path: Path, tiny_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path, [*make_rows(40), {"id": "d7", "text": "another", "lang": "de"}], 2, "a")
    job = make_job(tmp_path, tiny_base)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "commit", killed)
        with pytest.raises(KeyboardInterrupt):
            run_embed(job)
    report = run_embed(job)
    assert (report.units_embedded, report.duplicate_ids) == (0, 1)
    assert run_embed(job).duplicate_ids is None, "nothing has changed"


def test_a_run_that_another_one_overtook_leaves_the_table_to_it(
    tmp_path: Path, tiny_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path, make_rows(40), 2, "a")
    job = make_job(tmp_path, tiny_base)
    check = pipeline._check_all_rows_accounted

    def overtaken(*arguments: Any) -> None:
        monkeypatch.setattr(pipeline, "_check_all_rows_accounted", check)
        write_files(tmp_path, make_rows(30), 2, "a")
        assert run_embed(job).table_rows == 30
        check(*arguments)

    monkeypatch.setattr(pipeline, "_check_all_rows_accounted", overtaken)
    report = run_embed(job)
    assert (report.gave_way, report.version, report.rows, report.table_rows) == (True, 0, 40, 30)
    assert "the table stays as that one left it" in report.to_text()
    assert len(read(tmp_path)) == 30


def test_finished_files_are_published_while_the_run_goes_on(tmp_path: Path, tiny_base: str) -> None:
    write_files(tmp_path, make_rows(), 10, "a")
    job = make_job(tmp_path, tiny_base, embed__publish_every_minutes=1e-4)
    report = run_embed(job)
    assert report.version > 0
    table = open_table(report.table)
    counts = []
    for version in range(report.version + 1):
        table.load_as_version(version)
        counts.append(table.to_pyarrow_table().num_rows)
    assert counts == sorted(counts)
    assert all(count % 20 == 0 for count in counts), "a commit holds whole files"
    assert counts[-1] == NUM_ROWS
    assert run_embed(job).units_embedded == 0

    other = make_job(tmp_path, tiny_base, embed__publish_every_minutes=1e-4, model__pooling="lasttoken")
    assert run_embed(other).version == report.version + 1, "no version holds vectors of two kinds"


def test_the_overview_and_what_vacuum_removes(tmp_path: Path, tiny_base: str) -> None:
    job = make_job(tmp_path, tiny_base)
    write_files(tmp_path, [*make_rows(30), {"id": "x", "text": 5}, {"id": "y", "text": ""}], 1, "a")
    report = run_embed(job)
    overview = describe_table(job)
    assert (overview.rows, overview.dead_letters, overview.current_model) == (30, 2, True)
    assert dict(overview.reasons) == {"text is a number, not text": 1, "text is empty": 1}
    assert [version.fingerprint for version in overview.versions] == [report.fingerprint]
    folder = Path(report.table)
    (kept,) = folder.glob("part-*-0-16-*")
    left = folder / f"{kept.name[:-24]}{'0' * 16}.parquet"  # what a broken run left
    left.write_bytes(kept.read_bytes())
    assert remove_old_files(job) == []
    assert remove_old_files(job, retention_hours=0) == [left.name]
    assert kept.exists()
    write_files(tmp_path, make_rows(10), 1, "a")
    run_embed(job)
    assert kept.exists(), "readers of the version before may still need it"
    assert kept.name in remove_old_files(job, retention_hours=0)
    assert not kept.exists()
    assert describe_table(job).rows == 10


def test_parts_left_behind_are_taken_up_while_no_vacuum_can_remove_them(tmp_path: Path, tiny_base: str) -> None:
    job = make_job(tmp_path, tiny_base)
    write_files(tmp_path, make_rows(40), 1, "a")
    report = run_embed(job)
    assert report.units_total == 3
    storage.remove(f"{report.table}/_delta_log")
    old, *_ = Path(report.table).glob("part-*")
    days_ago = time.time() - 4 * 86400
    os.utime(old, (days_ago, days_ago))
    again = run_embed(job)
    assert (again.units_embedded, again.units_reused, again.table_rows) == (1, 2, 40)


def test_parts_that_vanish_before_the_commit_never_come_into_the_table(
    tmp_path: Path, tiny_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path, tiny_base)
    write_files(tmp_path, make_rows(20), 1, "a")
    check = pipeline._check_all_rows_accounted

    def vacuum_meanwhile(*arguments: Any) -> None:
        check(*arguments)
        next((tmp_path / "runs/docs/embeddings").glob("part-*")).unlink()

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_check_all_rows_accounted", vacuum_meanwhile)
        with pytest.raises(EmbedError, match=r"1 parts of this run, such as part-.* were removed"):
            run_embed(job)
    assert not storage.exists(f"{tmp_path}/runs/docs/embeddings/_delta_log")
    assert run_embed(job).table_rows == 20


def test_a_vector_that_is_not_the_model_s_is_found(tmp_path: Path, tiny_base: str) -> None:
    job = make_job(tmp_path, tiny_base)
    write_files(tmp_path, make_rows(12), 1, "a")
    folder = Path(run_embed(job).table)
    assert verify_table(job, num_rows=12).lowest_cosine > 0.99999
    (path,) = folder.glob("part-*")
    rows = pq.read_table(path)
    turned = np.roll(np.stack(rows["embedding"].to_numpy()), 1, axis=1)
    column = rows.schema.get_field_index("embedding")
    other = type(rows["embedding"].chunk(0)).from_arrays(turned.reshape(-1), turned.shape[1])
    pq.write_table(rows.set_column(column, rows.schema.field(column), other), path)
    with pytest.raises(EmbedError, match="holds a vector that differs from the model's"):
        verify_table(job, num_rows=12)
