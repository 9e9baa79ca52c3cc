"""Reads a retrieval set in BEIR layout: `corpus.jsonl`, `queries.jsonl`, `qrels/test.tsv` in one folder, local or on S3."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from ullme_ray import storage
from ullme_ray.errors import DataError

QRELS_HEADER = ("query-id", "corpus-id", "score")


@dataclass(frozen=True)
class LocalSet:
    """Judged queries and the corpus they search."""

    path: str
    version: str  # sha256 over the files' content
    queries: dict[str, str]  # id -> text; those with at least one relevant passage
    passages: dict[str, str]  # id -> title and text; those with any text
    qrels: dict[str, dict[str, int]]  # query id -> passage id -> judged score


def read_local_set(path: str, *, with_corpus: bool = True) -> LocalSet:
    """Reads and checks a whole set.

    Rules: a passage is its title, a newline, and its text (only the text when it has no title). A passage without any text is
    left out, for no search can find it, but still counts when it was judged relevant. Queries that no row of the qrels names,
    or only with scores below 1, are left out.

    Args:
        with_corpus: false reads no corpus.jsonl, so that neither passages nor their ids in the qrels are known.

    Raises:
        DataError: a file is missing or empty, or a row is broken; names file and line.
    """
    digest = hashlib.sha256()
    corpus = None
    if with_corpus:
        corpus = {id_: _passage_text(row) for id_, row in _read_rows(storage.join(path, "corpus.jsonl"), digest)}
    texts = {id_: str(row["text"]) for id_, row in _read_rows(storage.join(path, "queries.jsonl"), digest)}
    judged = _read_qrels(storage.join(path, "qrels", "test.tsv"), digest, texts, corpus)
    qrels = {query: scores for query, scores in judged.items() if max(scores.values()) > 0}
    if not qrels:
        raise DataError(f"{storage.join(path, 'qrels', 'test.tsv')} names no relevant passage (score 1 or more)")
    for query in qrels:
        if not texts[query].strip():
            raise DataError(
                f"{storage.join(path, 'queries.jsonl')}: query {query} has no text; write one, or take it out of the qrels"
            )
    return LocalSet(
        path=path,
        version=digest.hexdigest(),
        queries={query: texts[query] for query in qrels},
        passages={id_: text for id_, text in (corpus or {}).items() if text.strip()},
        qrels=qrels,
    )


def _passage_text(row: dict[str, object]) -> str:
    return f"{row['title']}\n{row['text']}" if row.get("title") else str(row["text"])


def _read_lines(path: str, digest: hashlib._Hash) -> Iterator[tuple[int, str]]:
    """(line number from 1, text) of every line that is not blank."""
    try:
        content = storage.read_bytes(path)
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist; a set is a folder with corpus.jsonl, queries.jsonl and qrels/test.tsv"
        ) from None
    digest.update(len(content).to_bytes(8, "little") + content)
    for number, line in enumerate(content.split(b"\n"), start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{path} line {number} is not UTF-8 text") from None
        if text.strip():
            yield number, text


def _read_rows(path: str, digest: hashlib._Hash) -> Iterator[tuple[str, dict[str, object]]]:
    """(id, row) of a JSONL file whose rows are {_id, text, ...}."""
    first_lines: dict[str, int] = {}
    for number, line in _read_lines(path, digest):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path} line {number} is not JSON: {error}") from None
        if not isinstance(row, dict) or "_id" not in row or not isinstance(row.get("text"), str):
            raise DataError(f'{path} line {number} must be an object like {{"_id": "7", "text": "..."}}')
        if not isinstance(row["_id"], (str, int)) or not isinstance(row.get("title") or "", str):
            raise DataError(f"{path} line {number}: _id and title must be text")
        id_ = str(row["_id"])
        if id_ in first_lines:
            raise DataError(f"{path} line {number} has the _id {id_} of line {first_lines[id_]}; ids must differ")
        first_lines[id_] = number
        yield id_, row
    if not first_lines:
        raise DataError(f"{path} is empty")


def _read_qrels(
    path: str, digest: hashlib._Hash, queries: dict[str, str], corpus: dict[str, str] | None
) -> dict[str, dict[str, int]]:
    lines = _read_lines(path, digest)
    number, header = next(lines, (1, ""))
    if tuple(header.split()) != QRELS_HEADER:
        raise DataError(f"{path} line {number} must be the header {' '.join(QRELS_HEADER)}, separated by tabs")
    qrels: dict[str, dict[str, int]] = {}
    for number, line in lines:
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) != len(QRELS_HEADER):
            raise DataError(f"{path} line {number} has {len(cells)} columns; it must have 3, separated by tabs")
        query, passage, score = cells
        if query not in queries:
            raise DataError(f"{path} line {number}: query {query} is not in queries.jsonl")
        if corpus is not None and passage not in corpus:
            raise DataError(f"{path} line {number}: passage {passage} is not in corpus.jsonl")
        if not score.lstrip("-").isdigit():
            raise DataError(f"{path} line {number}: score {score} is not a whole number")
        if passage in qrels.setdefault(query, {}):
            raise DataError(f"{path} line {number} judges passage {passage} for query {query} a second time")
        qrels[query][passage] = int(score)
    return qrels
