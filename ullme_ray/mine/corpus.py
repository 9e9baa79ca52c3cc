"""What is mined: the rows' queries and positives, and the passages that may become negatives.

Costs one reading of the sources and of the corpus, and about 200 bytes of memory a text.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ullme_ray import storage
from ullme_ray.errors import DataError
from ullme_ray.mine.search import Marked
from ullme_ray.mine.texts import TextStore
from ullme_ray.pairs import Source
from ullme_ray.row_files import CODECS, READ_ERRORS, lines, open_unpacked, plain_name
from ullme_ray.spec.job import CorpusSpec

_LINES = (".jsonl", ".ndjson", ".json")
_KINDS = f"{', '.join(_LINES)} (each plain or with {', '.join(CODECS)}) and .parquet"


class MiningTexts:
    """All unique queries and passages; of these the first `num_candidates` may become negatives.

    Args:
        corpus: passages to take negatives from; None means all of the sources.
        folder: local, for the texts.
    """

    def __init__(self, sources: Sequence[Source], corpus: Iterator[str] | None, folder: Path) -> None:
        self.queries = TextStore(folder / "queries.arrow")
        self.passages = TextStore(folder / "passages.arrow")
        for text in corpus or ():
            self.passages.add(text)
        self.num_candidates = len(self.passages)
        queries, positives = array("q"), array("q")
        for source in sources:
            for pair in source.pairs:
                query = self.queries.add(pair.query)
                for positive in pair.positives:
                    queries.append(query)
                    positives.append(self.passages.add(positive))
                if corpus is None:
                    for negative in pair.negatives:
                        self.passages.add(negative)
        if corpus is None:
            self.num_candidates = len(self.passages)
        self.queries.close()
        self.passages.close()
        # (query, passage) pairs of positives, over all rows with the same query text: sorted, each once
        pairs = np.unique(np.stack([np.array(queries), np.array(positives)], axis=1), axis=0)
        self._positive_queries, self._positives = np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])

    def place(self, query: int, passage: int) -> int:
        """Where a positive of a query stands among the positives of all, in the order in which `marked` gives them."""
        start, stop = np.searchsorted(self._positive_queries, [query, query + 1])
        return int(start + np.searchsorted(self._positives[start:stop], passage))

    def marked(self, first_query: int, num_queries: int) -> Marked:
        """The pairs that are never negatives of a block of queries, its positives first."""
        start, stop = np.searchsorted(self._positive_queries, [first_query, first_query + num_queries])
        own_rows, own_passages = [], []
        for row in range(num_queries):
            passage = self.passages.number(self.queries[first_query + row])
            if passage is not None:
                own_rows.append(row)
                own_passages.append(passage)
        rows = np.concatenate([self._positive_queries[start:stop] - first_query, np.array(own_rows, np.int64)])
        passages = np.concatenate([self._positives[start:stop], np.array(own_passages, np.int64)])
        return Marked(rows, passages, np.arange(len(rows)) < stop - start)


@dataclass
class Corpus:
    """The passages of `mine.corpus`, and how many of its rows have none that can be used."""

    path: str
    columns: tuple[str, ...]
    num_rejected: int = 0
    first_rejected: str = ""

    @classmethod
    def of(cls, spec: CorpusSpec, path: str) -> Corpus:
        return cls(path, spec.text)

    def files(self) -> list[storage.FileInfo]:
        """In the order in which they are read.

        Raises:
            DataError: there is none, or one is of another kind.
        """
        files = storage.list_files(self.path)
        if not files:
            raise DataError(f"mine.corpus.path = {self.path} matches no file; check the path")
        unknown = [f.path for f in files if not (plain_name(f.path).endswith(_LINES) or f.path.endswith(".parquet"))]
        if unknown:
            raise DataError(f"mine.corpus.path: {unknown[0]} is none of {_KINDS}; narrow the glob")
        return files

    def passages(self) -> Iterator[str]:
        """Of all files; a row without one is counted.

        Raises:
            DataError: a file cannot be read, or no row of all has a passage.
        """
        num_good = 0
        for file in self.files():
            for number, row in enumerate(_rows(file.path, self.columns), start=1):
                text = _text(row, self.columns)
                if text is not None:
                    num_good += 1
                    yield text
                else:
                    self.num_rejected += 1
                    self.first_rejected = self.first_rejected or f"{file.path} row {number}"
        if not num_good:
            named = " and ".join(self.columns)
            raise DataError(
                f"mine.corpus.path = {self.path}: none of {self.num_rejected} rows has text in {named} "
                f"(first: {self.first_rejected or 'the files are empty'}); check mine.corpus.text"
            )


def _rows(path: str, columns: Sequence[str]) -> Iterator[Any]:
    """The rows of one file; a line that is no JSON comes as None."""
    try:
        with storage.open_read(path) as stream:
            if path.endswith(".parquet"):
                file = pq.ParquetFile(stream)
                present = [name for name in columns if name in file.schema_arrow.names]
                for batch in file.iter_batches(columns=present):
                    yield from batch.to_pylist()
                return
            for line in lines(open_unpacked(stream, path)):
                if line.content is None:
                    yield None
                elif line.content.strip():
                    try:
                        yield json.loads(line.content)
                    except (ValueError, RecursionError):
                        yield None
    except READ_ERRORS as error:
        raise DataError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def _text(row: Any, columns: Sequence[str]) -> str | None:
    """The columns joined with a newline, blank ones left out; None where a value is no text or nothing is left."""
    values = [row.get(name) for name in columns] if isinstance(row, dict) else [None]
    if not all(value is None or isinstance(value, str) for value in values):
        return None
    text = "\n".join(value for value in values if value and value.strip())
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which no tokenizer takes
        return None
    return text or None
