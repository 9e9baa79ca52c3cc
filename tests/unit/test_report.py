"""The report of a run: what the folder holds is drawn, what it lacks is said, odd and partial folders give a clear result."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_run import ROWS, TEXT, make_run, make_whole_run
from typer.testing import CliRunner

from ullme_ray.cli import app
from ullme_ray.errors import UllmeError
from ullme_ray.model import open_encoder
from ullme_ray.report import curves
from ullme_ray.report.inputs import Missing, read_embed_report, read_evaluation, read_serve_bench
from ullme_ray.report.page import Report, write_report
from ullme_ray.report.pictures import Picture, scatter
from ullme_ray.report.vectors import flatten, measure_similarity, padding_of_batches, sample_table, similarity
from ullme_ray.spec import JobSpec

SECTIONS = {"training", "retrieval", "generation", "mteb", "similarities", "corpus", "embed run", "serving"}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return write_report(make_run(tmp_path_factory.mktemp("report")), num_queries=0)


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return Path(report.page).read_text()


def missing_in(page: str) -> set[str]:
    return set(re.findall(r'data-missing="([^"]+)"', page))


def test_everything_there_is_drawn_and_what_is_not_is_said(report: Report, page: str) -> None:
    assert set(report.missing) == missing_in(page) == {"generation", "mteb", "similarities", "serving"}
    assert "as asked (--queries 0)" in page
    assert "serve_bench.json is not there yet" in page
    wanted = {"loss", "terms-of-the-loss", "tokens-per-second", "model-flop-utilisation-mfu", "validation-ndcg"}
    wanted |= {"retrieval-0", "lengths", "padding", "map-of-the-corpus", "rows-by-fate"}
    assert wanted <= set(report.pictures)
    for name in report.pictures:
        assert Path(report.page).with_name(f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert page.count("<figure id=") == len(report.pictures) - 1  # the map is drawn by the page itself
    assert page.count('<circle cx="') == ROWS  # a point per row
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))  # two pictures with one id would borrow each other's clip paths
    for cell in ("0.4000 (0.300 to 0.500)", "+0.2000 (+0.100 to +0.300)", "1,234.50"):  # model, comparison, ledger
        assert cell in page


def test_page_asks_nobody_and_follows_the_screen(page: str) -> None:
    assert not re.search(r'<[^>]* (?:src|href)="(?!#)', page)
    assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttpRequest", page)
    drawings = page.split("</style>", 1)[1]
    assert not re.search(r"#(?:2563c9|1c2330|6a7484)", drawings)  # no fixed colour: each is a variable
    assert "prefers-color-scheme: dark" in page


def test_texts_of_the_corpus_never_become_markup(page: str) -> None:
    assert "<img" not in page
    rows = json.loads(page.split('id="map-rows">', 1)[1].split("</script>", 1)[0])
    assert len(rows) == ROWS
    assert sorted(row[2] for row in rows) == [f"row-{i:03}" for i in range(ROWS)]
    assert {row[3] for row in rows} == {TEXT}


@pytest.mark.parametrize(
    ("file", "content", "read", "reason"),
    [
        ("evaluation/report.json", '{"sets": [{"pa', read_evaluation, "is damaged: it is not JSON"),
        ("evaluation/report.json", '{"sets": [{"path": "x"}]}', read_evaluation, "does not hold what `ullme-ray evaluate`"),
        ("evaluation/report.json", "[]", read_evaluation, "does not hold what `ullme-ray evaluate`"),
        ("evaluation/report.json", '{"sets": []}', read_evaluation, r"does not hold it yet; .* \(evaluate\.local\)"),
        ("embed_report.json", "[1]", read_embed_report, "does not hold what `ullme-ray embed` writes"),
        ("serve_bench.json", "{}", read_serve_bench, "is not a list of rows"),
        ("embeddings/_delta_log/00000000000000000000.json", "{", sample_table, "read"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, file: str, content: str, read: Callable[[JobSpec], Any], reason: str) -> None:
    job = make_run(tmp_path)
    if file != "serve_bench.json":
        assert read(job)  # the control: it was good
    (tmp_path / "docs" / file).write_text(content)
    with pytest.raises(Missing, match=reason) as error:
        read(job)
    assert file.split("/")[0] in str(error.value)


def test_an_empty_run_says_all_that_it_lacks_and_no_run_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(f"name: docs\nstorage: {tmp_path}\nmodel: {{base: b}}\nembed: {{input: {{path: x}}}}\n")
    absent = CliRunner().invoke(app, ["report", str(path), "--json"])
    assert absent.exit_code == UllmeError.exit_code
    assert "holds no run of this job yet (no job.yaml)" in json.loads(absent.output)["message"]
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "job.yaml").write_text("")
    done = CliRunner().invoke(app, ["report", str(path)])
    assert done.exit_code == 0, done.output
    for section in SECTIONS:
        assert f"without {section}: " in done.output
    assert missing_in((tmp_path / "docs" / "report" / "index.html").read_text()) == SECTIONS


def test_similarities_are_those_a_person_can_compute() -> None:
    queries = np.array([[1.0, 0], [0, 1]], np.float32)
    passages = np.array([[0.6, 0.8], [0, 1]], np.float32)
    found = similarity("trained", queries, passages, np.arange(2), np.eye(2, dtype=bool))
    assert found.positives.tolist() == pytest.approx([0.6, 1.0])
    assert sorted(found.negatives.tolist()) == pytest.approx([0.0, 0.8])
    assert found.alignment == pytest.approx((0.8 + 0.0) / 2)
    assert found.uniformity == pytest.approx(-2 * (2 - 2 * 0.8))  # one pair of passages, cosine 0.8
    alone = similarity("trained", queries, passages[:1], np.zeros(2, int), np.ones((2, 1), bool))
    assert alone.uniformity is None


def test_only_relevant_passages_are_positives_and_each_counts_once(tmp_path: Path, tiny_base: str) -> None:
    """The first judged passage of every query is irrelevant to it, and two queries share theirs."""
    job = make_whole_run(tmp_path, tiny_base)
    base, _ = measure_similarity(job, 10)
    encoder = open_encoder(job, which="base", device="cpu")
    queries = encoder.encode([f"the bucket {n}" for n in range(6)], "query")
    passages = encoder.encode([f"makes the object {n} private" for n in range(5)], "passage")
    cosines, own = queries @ passages.T, [0, 0, 1, 2, 3, 4]
    assert base.positives == pytest.approx(cosines[np.arange(6), own], abs=1e-5)
    others = cosines[np.arange(5) != np.array(own)[:, None]]
    assert sorted(base.negatives) == pytest.approx(sorted(others), abs=1e-5)  # 24, those judged 0 among them
    between = (passages @ passages.T)[np.triu_indices(5, 1)]
    assert base.uniformity == pytest.approx(np.log(np.mean(np.exp(4 * between - 4))), abs=1e-4)


def test_generation_and_mteb_are_shown_and_what_failed_is_said(tmp_path: Path, tiny_base: str) -> None:
    report = write_report(make_whole_run(tmp_path, tiny_base), num_queries=0)
    page = Path(report.page).read_text()
    for cell in ("31.50 (30.00 to 33.00)", "0.625 (0.500 to 0.750)", "0.125 (0.000 to 0.250)", "STS12", "0.7125"):
        assert f">{cell}</t" in page
    assert "trained: not measured, for the adapter that generates is not exported" in page
    assert report.missing["mteb NFCorpus"] == "the task NFCorpus cannot be run"


def test_a_part_that_the_job_does_not_ask_for_is_told_from_one_to_come(tmp_path: Path, tiny_base: str) -> None:
    job = make_whole_run(tmp_path, tiny_base)
    path = tmp_path / "docs" / "evaluation" / "report.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "sets": [], "mteb": None}))
    asked = JobSpec.model_validate({**job.model_dump(), "evaluate": {"mteb": ["STS12"]}})
    report = write_report(asked, num_queries=0)
    assert report.missing["retrieval"] == "the job does not ask for it (evaluate.local)"
    assert "does not hold it yet; run `ullme-ray evaluate` again (evaluate.mteb)" in report.missing["mteb"]
    assert "generation" not in report.missing


def test_a_run_without_validation_says_what_would_draw_it(tmp_path: Path) -> None:
    job = make_run(tmp_path)
    path = tmp_path / "docs" / "metrics" / "train.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**record, "validation_ndcg": None}) + "\n" for record in records))
    report = write_report(job, num_queries=0)
    assert "nDCG over steps needs train.validation" in report.missing["validation"]
    assert "validation" in missing_in(Path(report.page).read_text())


@pytest.mark.parametrize("label", [r"$\mbox{x}$", "$5 to $10", "_draft", ""])
def test_any_text_of_the_corpus_can_be_a_label(label: str) -> None:
    picture = scatter("map", "map", np.eye(2), [0, 1], [label, "b"], "")
    assert picture.png().startswith(b"\x89PNG")
    shown = [text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", picture.svg())]
    assert set(shown) == {label, "b"}


def test_the_ticks_of_a_log_axis_are_numbers() -> None:
    records = [{"step": step, "grad_norm": 10.0**step} for step in range(4)]
    (panel,) = curves.panels_of(records)
    assert panel.log
    svg = Picture("norm", panel.title, lambda axes: curves.draw_panel(axes, panel, records)).svg()
    assert ">100</text>" in svg
    assert "$" not in svg


def test_padding_is_that_of_batches_of_32() -> None:
    lengths = np.array([1, 3] * 32)
    found = padding_of_batches(lengths)
    assert found["as they come"].tolist() == pytest.approx([1 - 64 / 96] * 2)
    assert found["sorted by length"].tolist() == pytest.approx([0.0, 0.0])


@pytest.mark.parametrize(("rows", "width", "method"), [(1, 8, "PCA"), (3, 1, "PCA"), (80, 16, "t-SNE")])
def test_any_number_of_vectors_becomes_a_flat_map(rows: int, width: int, method: str) -> None:
    vectors = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)
    name, points = flatten(vectors, seed=1)
    assert (name, points.shape) == (method, (rows, 2))
    assert np.isfinite(points).all()
