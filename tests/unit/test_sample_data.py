"""The built-in data set: its rules on small documentation made here, and the real one that botocore holds."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from ullme_ray import storage
from ullme_ray.errors import DataError
from ullme_ray.retrieval.local_set import read_local_set
from ullme_ray.sample_data import MIN_PASSAGE_CHARS, Pair, build_files, ensure_dataset, read_api_docs, split_documentation
from ullme_ray.spec import JobSpec, RunFolder
from ullme_ray.spec.job import DatasetSpec

LONG = (
    "It says a good deal more about how this is used, with which permissions, and what the caller gets back from it in the end."
)
SECTION = DatasetSpec(name="aws_api_docs", heldout_queries=2, negatives_per_query=3)


@pytest.fixture(scope="module")
def api_docs() -> list[Pair]:
    return read_api_docs()


def job_with_dataset(folder: Path, **section: int) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "docs",
            "storage": str(folder),
            "model": {"base": "x"},
            "dataset": {"name": "aws_api_docs", "heldout_queries": 50, "max_pairs": 400, **section},
            "evaluate": {"local": [{"path": "run:data/heldout"}]},
        }
    )


def write_service(root: Path, service: str, version: str, operations: dict[str, str], name: str = "Amazon Thing") -> None:
    folder = root / service / version
    folder.mkdir(parents=True)
    model = {"metadata": {"serviceFullName": name}, "operations": {o: {"documentation": d} for o, d in operations.items()}}
    (folder / "service-2.json.gz").write_bytes(gzip.compress(json.dumps(model).encode()))


@pytest.mark.parametrize(
    ("html", "sentence", "passage"),
    [
        ("<p>Makes a thing. More of it.</p>", "Makes a thing.", "More of it."),
        (
            "<note><p>Not for you.</p></note> <p>Makes a <code>thing</code>.</p><p>Rest.</p>",
            "Makes a thing.",
            "Not for you.\nRest.",
        ),
        ("<p>Takes some, e.g. three. Gives one.</p>", "Takes some, e.g. three.", "Gives one."),
        ("<p>Reads v1.2 of it! <i>Then</i> ends.</p>", "Reads v1.2 of it!", "Then ends."),
        ("<p>One &amp; only</p><ul><li><p>a</p></li><li>b</li></ul>", "One & only", "a\nb"),
        ("<note>Only a box.</note>", "", "Only a box."),
        ("", "", ""),
    ],
)
def test_documentation_is_split_at_its_first_sentence(html, sentence, passage):
    assert split_documentation(html) == (sentence, passage)


def test_unusable_operations_are_left_out_and_the_newest_version_is_read(tmp_path):
    assert len(LONG) >= MIN_PASSAGE_CHARS
    write_service(tmp_path, "thing", "2019-01-01", {"Old": f"<p>Is old.</p><p>{LONG}</p>"})
    write_service(
        tmp_path,
        "thing",
        "2020-01-01",
        {
            "Good": f"<p>Is good.</p><p>{LONG}</p>",
            "Short": "<p>Is short.</p><p>Too little.</p>",
            "Leak": f"<p>Gives itself away.</p><p>Gives itself away. {LONG}</p>",
            "TwinA": f"<p>Is the same.</p><p>{LONG} A</p>",
            "TwinB": f"<p>Is the same.</p><p>{LONG} B</p>",
            "SharedA": f"<p>Is first.</p><p>{LONG} Boilerplate.</p>",
            "SharedB": f"<p>Is second.</p><p>{LONG} Boilerplate.</p>",
            "Escaped": f"<p>Is escaped.</p><p>{LONG} &lt;p&gt;More.&lt;/p&gt;</p>",
            "None": "",
        },
    )
    (pair,) = read_api_docs(tmp_path)
    assert (pair.key, pair.query, pair.passage) == ("thing.Good", "Amazon Thing: Is good.", LONG)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no API documentation"):
        read_api_docs(tmp_path)


def test_the_same_passage_in_two_services_is_one_document_on_one_side_of_the_split():
    pairs = [Pair(s, s.upper(), f"Op{n}", f"Does {n}.", f"passage {n} of {s if n else 'all'}") for s in "abc" for n in range(5)]
    for seed in range(20):
        files, counts = build_files(pairs, SECTION, seed)
        assert counts == {"train": 13, "heldout": 2, "corpus": 13}
        heldout = [line.split("\t")[1] for line in files["heldout/qrels/test.tsv"].splitlines()[1:]]
        by_id = {row["_id"]: row["text"] for row in map(json.loads, files["heldout/corpus.jsonl"].splitlines())}
        positives = {json.loads(line)["positive"] for line in files["train.jsonl"].splitlines()}
        assert not positives & {by_id[id_] for id_ in heldout}


def test_too_many_heldout_queries_are_refused():
    pairs = [Pair("a", "A", f"Op{n}", f"Does {n}.", f"passage {n}") for n in range(3)]
    with pytest.raises(DataError, match=r"dataset\.heldout_queries = 2 of 3 pairs"):
        build_files(pairs, SECTION, seed=1)


def test_botocore_gives_thousands_of_pairs_without_leaks(api_docs):
    assert len(api_docs) > 5000
    assert len({pair.service for pair in api_docs}) > 200
    assert not [pair.key for pair in api_docs if pair.sentence in pair.passage]
    assert not [pair.key for pair in api_docs if "<p>" in pair.passage or len(pair.passage) < MIN_PASSAGE_CHARS]


def test_the_quickstarts_question_has_answers_in_the_corpus(api_docs):
    passages = {pair.key: pair.passage.lower() for pair in api_docs}
    for key in ("s3.PutPublicAccessBlock", "s3.PutBucketAcl", "s3.GetPublicAccessBlock", "s3.PutBucketPolicy"):
        assert "bucket" in passages[key], key
    assert "public" in passages["s3.PutPublicAccessBlock"]


def test_same_seed_same_bytes_and_another_seed_others(api_docs):
    section = DatasetSpec(name="aws_api_docs", max_pairs=500)
    first, _ = build_files(api_docs, section, seed=1)
    again, _ = build_files(read_api_docs(), section, seed=1)
    other, _ = build_files(api_docs, section, seed=2)
    assert first == again
    assert all(first[name] != other[name] for name in first)


def test_the_written_folder_holds_what_every_stage_needs(tmp_path):
    job = job_with_dataset(tmp_path)
    ensure_dataset(job)
    data = RunFolder.of(job).data
    train = [json.loads(line) for line in storage.read_text(f"{data}/train.jsonl").splitlines()]
    corpus = [json.loads(line) for line in storage.read_text(f"{data}/corpus.jsonl").splitlines()]
    heldout = read_local_set(f"{data}/heldout")
    assert len(train) == 350
    assert len(heldout.queries) == 50
    assert not {row["query"] for row in train} & set(heldout.queries.values())
    assert {row["positive"] for row in train} < set(heldout.passages.values())
    assert {row["id"]: row["text"] for row in corpus} == heldout.passages
    assert set(corpus[0]) == {"id", "title", "text", "service", "operation"}
    assert any(len(row["negatives"]) == 4 for row in train)
    of_service = {(row["service"], row["positive"]) for row in train}
    for row in train:
        assert row["positive"] not in row["negatives"]
        assert len(set(row["negatives"])) == len(row["negatives"])
        assert {(row["service"], negative) for negative in row["negatives"]} <= of_service
    held_out = [json.loads(line) for line in storage.read_text(f"{data}/heldout_pairs.jsonl").splitlines()]
    answers = {query: [heldout.passages[passage] for passage in judged] for query, judged in heldout.qrels.items()}
    assert {row["query"]: [row["positive"]] for row in held_out} == {heldout.queries[q]: texts for q, texts in answers.items()}
    passages = {(row["service"], row["text"]) for row in corpus}
    for row in held_out:
        assert row["positive"] not in row["negatives"]
        assert {(row["service"], negative) for negative in row["negatives"]} <= passages
    assert any(len(row["negatives"]) == 4 for row in held_out)


def test_data_is_written_once_and_again_only_for_other_settings(tmp_path):
    job = job_with_dataset(tmp_path)
    ensure_dataset(job)
    data = Path(RunFolder.of(job).data)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in data.rglob("*") if path.is_file()}
    assert len(before) == 7
    ensure_dataset(job)
    assert {path: path.stat().st_mtime_ns for path in before} == {path: time for path, (time, _) in before.items()}

    ensure_dataset(job_with_dataset(tmp_path, max_pairs=300))
    assert len((data / "train.jsonl").read_text().splitlines()) == 250

    (data / "dataset.json").unlink()  # as after a crash before the last file
    (data / "corpus.jsonl").write_text("half")
    ensure_dataset(job)
    assert {path: path.read_bytes() for path in before} == {path: content for path, (_, content) in before.items()}
