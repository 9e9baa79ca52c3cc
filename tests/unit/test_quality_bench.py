"""The quality bench compares fairly: the same held-out queries for all, no hard negative that is right, honest intervals."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import real_pairs
import torch
from transformers import AutoModelForCausalLM

from ullme_ray.model.encoder import open_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import quality

WORDS = ["bucket", "table", "query", "index", "policy", "object", "stream", "cluster", "secret", "volume"]


def write_pairs(folder: Path) -> Path:
    """40 training and 10 held-out rows; the first training query has two passages."""
    rows = [{"query": f"make a {a} {b}", "positive": f"creates one {b} for the {a}"} for a in WORDS[:5] for b in WORDS]
    splits = {"train": [*rows[:40], {"query": rows[0]["query"], "positive": rows[1]["positive"]}], "test": rows[40:]}
    for split, chosen in splits.items():
        with gzip.open(folder / f"docs.{split}.jsonl.gz", "wt") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in chosen)
    return folder


def test_training_rows_have_hard_negatives_that_are_never_right(tmp_path: Path) -> None:
    target = tmp_path / "hard" / "docs.jsonl"
    quality.write_training_rows(write_pairs(tmp_path), "docs", target, 100)
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert len(rows) == 41
    right: dict[str, set[str]] = {}
    for row in rows:
        right.setdefault(row["query"], set()).add(row["positive"])
    assert max(map(len, right.values())) == 2
    for row in rows:
        assert row["negatives"]
        assert not right[row["query"]] & set(row["negatives"])


def test_every_run_is_measured_on_the_same_held_out_queries(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path)
    one, two = (quality.make_test_set(folder, "docs", 6, 20) for _ in range(2))
    assert one == two
    assert (len(one.queries), len(one.passages)) == (6, 20)
    trained = {row["query"] for row in quality.read_pairs(folder / "docs.train.jsonl.gz")}
    assert not trained & set(one.queries.values())
    for query, judged in one.qrels.items():
        assert judged
        assert set(judged) <= set(one.passages)
        assert query in one.queries


def test_a_cell_trains_and_its_attention_and_seed_matter(tmp_path: Path, tiny_base: str) -> None:
    folder = write_pairs(tmp_path)
    args = quality.parse(
        f"{tiny_base} --pairs {folder} --sets docs --folder {tmp_path}/out --steps 2 --batch-size 4 --max-tokens 48".split()
    )
    quality.write_training_rows(folder, "docs", tmp_path / "out" / "hard" / "docs.jsonl", 100)
    test_sets = [quality.make_test_set(folder, "docs", 6, 20)]

    def runs(cell: quality.Cell, seed: int = 1) -> list[float]:
        job = quality.make_job(args, cell, seed)
        (run,), checks = quality.own_runs(job, test_sets, train=cell.is_trained, num_checked=3)
        logps.append([logp for row in checks for logp in row["logps"]])
        return [score for query in run.values() for score in sorted(query.values())]

    logps: list[list[float]] = []
    default = runs(quality.DEFAULT)
    assert runs(quality.DEFAULT) == default
    assert logps[0] == logps[1]
    others = [quality.Cell("base"), quality.Cell("grl"), quality.Cell(bidirectional=False), quality.Cell(prompts=False)]
    for other in others:
        assert runs(other) != default, other
    assert logps[2] != logps[0]  # training the vectors has moved what the same weights generate
    assert runs(quality.DEFAULT, seed=2) != default


def test_generation_is_checked_with_wrong_passages_beside_the_right_ones(tmp_path: Path, tiny_base: str) -> None:
    folder = write_pairs(tmp_path)
    test_set = quality.make_test_set(folder, "docs", 6, 20)
    rows = quality.checked_queries(test_set, 4)
    assert rows == quality.checked_queries(test_set, 4)
    assert len({row.query for row in rows}) == 4
    for row in rows:
        (id_,) = [id_ for id_, query in test_set.queries.items() if query == row.query]
        right = {test_set.passages[passage] for passage in test_set.qrels[id_]}
        assert set(row.passages[: row.num_positives]) == right
        assert row.num_negatives == quality.NUM_WRONG
        assert len(set(row.passages)) == row.num_positives + row.num_negatives
    args = quality.parse(f"{tiny_base} --pairs {folder} --sets docs --folder {tmp_path}/out --max-tokens 48".split())
    _, (first, *_) = quality.own_runs(quality.make_job(args, quality.Cell("base"), 1), [test_set], train=False, num_checked=4)
    tokenizer = open_tokenizer(quality.make_job(args, quality.Cell("base"), 1), which="base")
    scored = [tokenizer.tokenize_generation(rows[0].query, passage, max_tokens=96) for passage in rows[0].passages]
    assert first["lengths"] == [passage.passage_length for passage in scored]
    lm = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval().requires_grad_(False)
    for passage, logp in zip(scored, first["logps"]):
        ids = torch.tensor([passage.input_ids])
        steps = lm(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        assert logp == pytest.approx(float(steps[-passage.passage_length :].sum()), abs=1e-3)


def test_intervals_hold_both_draws_and_differences_are_paired() -> None:
    generator = np.random.default_rng(0)
    queries = generator.uniform(0.2, 0.8, size=100)
    ours, theirs = np.stack([queries + 0.1] * 3), np.stack([queries] * 3)
    mean, low, high = quality.interval(ours)
    assert low < mean < high
    assert quality.interval(ours, theirs) == pytest.approx((0.1, 0.1, 0.1))  # queries differ much, but alike for both
    unlike = np.stack([queries, queries + 0.2, queries + 0.1])  # the same mean, but seeds that differ
    assert np.subtract(*quality.interval(unlike, theirs)[:0:-1]) > 0.05


def test_a_folder_of_other_arguments_is_refused_and_rows_are_as_many_as_asked(tmp_path: Path, tiny_base: str) -> None:
    line = f"{tiny_base} --pairs {write_pairs(tmp_path)} --sets docs --folder {tmp_path}/out --queries 6 --passages 20"
    for rows in (5, 7):  # nothing is measured yet: the rows are made anew
        quality.prepare(quality.parse(f"{line} --rows {rows}".split()))
        for kind in ("hard", "plain"):
            assert len((tmp_path / "out" / kind / "docs.jsonl").read_text().splitlines()) == rows
    args = quality.parse(f"{line} --rows 7".split())
    record = quality.work(args, quality.Cell("bm25"), 0)
    results = tmp_path / "out" / "results.jsonl"
    results.write_text(json.dumps(record) + "\n")
    found = {(quality.Cell("bm25"), 0): record}
    for same in ("", "--seeds 5", "--at-once 2 --threads 2 --chunk-size 2", "--other somewhere"):
        assert quality.read_results(results, quality.parse(f"{line} --rows 7 {same}".split())) == found
    for name, value in {"steps": 20, "learning-rate": 0.5, "queries": 7, "sets": "aws", "rows": 6}.items():
        other = quality.parse(f"{line} --rows 7 --{name} {value}".split())
        with pytest.raises(SystemExit, match=rf"results\.jsonl holds runs with {name.replace('-', '_')} = .*; give the same"):
            quality.read_results(results, other)
    results.write_text(json.dumps({name: value for name, value in record.items() if name != "made_with"}) + "\n")
    with pytest.raises(SystemExit, match="do not say with which arguments"):
        quality.read_results(results, args)


def test_table_has_a_line_per_cell_and_reads_what_was_cut_off(tmp_path: Path) -> None:
    args = quality.parse(["base"])
    lines = [
        {
            "cell": vars(cell),
            "seed": seed,
            "made_with": quality.made_with(args, cell),
            "scores": {"docs": [0.1 * seed, value]},
            "checks": [
                {"num_positives": 1, "num_negatives": 1, "cosines": [0.5, 0.4], "logps": [-2.0 * seed, -5.0], "lengths": [2, 2]}
            ],
            "seconds": 1.0,
        }
        for cell, value in ((quality.DEFAULT, 0.5), (quality.Cell("grl"), 0.7))
        for seed in (1, 2)
    ]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cell": {"strat')
    found = quality.read_results(path, args)
    assert set(found) == {(cell, seed) for cell in (quality.DEFAULT, quality.Cell("grl")) for seed in (1, 2)}
    text = quality.table(found).splitlines()
    assert [line.split(" | ")[0] for line in text[2:]] == ["| cl", "| grl"]
    assert "0.300 0.350" in text[2]
    assert "+0.100" in text[3]
    checks = quality.checks_table(found).splitlines()
    assert checks[2] == "| cl | 5.1 (2.7 7.4) | 1.000 (1.000 1.000) | 1.000 (1.000 1.000) |"
    assert [line.split(" | ")[0] for line in checks[2:]] == ["| cl", "| grl"]


def test_wordnet_pairs_show_a_word_of_their_entry(tmp_path: Path) -> None:
    entry = '00001837 02 r 02 quickly 0 in_haste 0 000 | with speed; "she spoke quickly to us"; "not so"; "quickly!"  '
    for part in ("noun", "verb", "adj", "adv"):
        (tmp_path / f"data.{part}").write_text("  1 the licence\n" + (entry + "\n" if part == "adv" else ""))
    assert list(real_pairs.wordnet(tmp_path)) == [{"query": "she spoke quickly to us", "positive": "quickly: with speed"}]


def test_pydoc_pairs_are_signatures_with_their_own_description(tmp_path: Path) -> None:
    page = """<p>Nothing of an entry.</p>
    <dl class="py class">
      <dt class="sig sig-object py" id="x.Pool"><em class="property"><span class="pre">class</span> </em>
        <span class="sig-prename descclassname">x.</span><span class="sig-name">Pool</span>(<em>n</em>)
        <a class="headerlink" href="#x">\u00b6</a></dt>
      <dd><p>A pool of <code>n</code> workers &amp; a queue <br>of tasks.</p>
        <ul><li><p>An item.</p></li></ul><p>Not thread-safe.</p>
        <dl class="py method"><dt class="sig"><span>close</span>()</dt><dd><p>Ends all workers of this pool.</p></dd></dl>
      </dd></dl>
    <dl class="py function"><dt class="sig">short()</dt><dd><p>Too short.</p></dd></dl>
    <dl class="simple"><dt>A word</dt><dd><p>That the page explains, but no signature.</p></dd></dl>"""
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "x.html").write_text(page)
    assert {row["query"]: row["positive"] for row in real_pairs.pydoc(tmp_path)} == {
        "class Pool(n)": "A pool of n workers & a queue of tasks. Not thread-safe.",
        "close()": "Ends all workers of this pool.",
    }


def test_a_query_is_on_one_side_of_the_split(tmp_path: Path) -> None:
    pairs = [{"query": f"q{n % 40}", "positive": f"p{n}"} for n in range(80)]
    real_pairs.write_split([*pairs, pairs[0]], "docs", tmp_path)
    train, test = (quality.read_pairs(tmp_path / f"docs.{split}.jsonl.gz") for split in ("train", "test"))
    assert len({row["query"] for row in test}) == 2
    assert not {row["query"] for row in test} & {row["query"] for row in train}
    assert sorted(row["positive"] for row in [*train, *test]) == sorted(row["positive"] for row in pairs)
