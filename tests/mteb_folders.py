"""Task folders in mteb's dataset layout, made of real texts: AWS operations and what their documentation says of them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import yaml


def write_folders(data: Path, target: Path) -> dict[str, Path]:
    """One folder per type of task.

    Args:
        data: `run:data` of the built-in data set.
    """
    corpus = [json.loads(line) for line in (data / "corpus.jsonl").read_text().splitlines()]
    by_service = defaultdict(list)
    for row in corpus:
        by_service[row["service"]].append(row)
    services = sorted(by_service, key=lambda service: (-len(by_service[service]), service))[:3]
    labelled = [(row, services.index(row["service"])) for service in services for row in by_service[service]]
    names = ("retrieval", "sts", "pair_classification", "classification", "clustering")
    made = {name: target / f"Aws{name.title().replace('_', '')}" for name in names}
    _retrieval(made["retrieval"], data / "heldout")
    pairs = []
    for n, (row, label) in enumerate(labelled):
        other, other_label = labelled[(n * 7 + 3) % len(labelled)]
        stranger = corpus[(n * 11 + 5) % len(corpus)]
        pairs += [(row["title"], row["text"], 2.0), (row["title"], other["text"], float(other_label == label))]
        pairs += [(row["title"], stranger["text"], float(stranger["service"] == row["service"]))]
    sts = ({"sentence1": a, "sentence2": b, "score": score} for a, b, score in pairs)
    _folder(made["sts"], {"test.jsonl": sts}, _plain())
    binary = ({"sentence1": a, "sentence2": b, "labels": int(score == 2)} for a, b, score in pairs)
    _folder(made["pair_classification"], {"test.jsonl": binary}, _plain())
    rows = [{"text": row["text"], "label": label} for row, label in labelled]
    _folder(made["classification"], {"train.jsonl": rows[::2], "test.jsonl": rows[1::2]}, _plain("train", "test"))
    groups = ({"sentences": row["text"], "labels": label} for row, label in labelled)
    _folder(made["clustering"], {"test.jsonl": groups}, _plain())
    return made


def _retrieval(target: Path, heldout: Path) -> None:
    def rows(name: str) -> list[dict]:
        return [json.loads(line) for line in (heldout / name).read_text().splitlines()]

    qrels = [line.split("\t") for line in (heldout / "qrels" / "test.tsv").read_text().splitlines()[1:]]
    corpus = [{"_id": row["_id"], "title": row.get("title", ""), "text": row["text"]} for row in rows("corpus.jsonl")]
    queries = [{"_id": row["_id"], "text": row["text"]} for row in rows("queries.jsonl")]
    judged = [{"query-id": query, "corpus-id": passage, "score": int(score)} for query, passage, score in qrels]
    configs = [
        {"config_name": config, "data_files": [{"split": split, "path": f"{name}.jsonl"}]}
        for config, split, name in (
            ("default", "test", "qrels"),
            ("corpus", "corpus", "corpus"),
            ("queries", "queries", "queries"),
        )
    ]
    _folder(target, {"corpus.jsonl": corpus, "queries.jsonl": queries, "qrels.jsonl": judged}, configs)


def _plain(*splits: str) -> list[dict]:
    files = [{"split": split, "path": f"{split}.jsonl"} for split in splits or ("test",)]
    return [{"config_name": "default", "data_files": files}]


def _folder(target: Path, files: dict[str, Iterable[dict]], configs: list[dict]) -> None:
    target.mkdir(parents=True)
    for name, rows in files.items():
        (target / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (target / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
