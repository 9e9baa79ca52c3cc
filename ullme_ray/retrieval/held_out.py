"""The sets of an `evaluate` section: BEIR folders, files of rows, or queries whose passages are in the embeddings table."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ullme_ray.errors import DataError
from ullme_ray.pairs.readers import is_known
from ullme_ray.pairs.rows import Pair
from ullme_ray.pairs.strict import list_rows, strict_rows
from ullme_ray.retrieval.local_set import LocalSet, read_local_set
from ullme_ray.spec.job import JobSpec
from ullme_ray.spec.run_folder import RunFolder

_SAMPLE = 6  # an independent random stream of the job's seed; training has 1 to 3, mining 4, validation 5


def read_held_out(job: JobSpec, position: int) -> LocalSet:
    """The set of `evaluate.local.<position>`, with `max_queries` of its queries.

    Rules of rows: a passage is one text, however many rows have it; a query is one text, and all that any row calls its
    positive is relevant to it (score 1). Negatives are passages of the corpus like others.

    Raises:
        DataError: it is missing or broken.
    """
    assert job.evaluate is not None
    spec, folder = job.evaluate.local[position], RunFolder.of(job)
    path = folder.resolve(spec.path)
    if is_known(path) or glob.has_magic(path):
        if spec.table:
            raise DataError(
                f"evaluate.local.{position}.path = {path} holds rows, whose passages have no ids that a table could know; "
                "give a folder with queries.jsonl and qrels/test.tsv, or set table: false"
            )
        key = f"evaluate.local.{position}"
        extra = (pair for more in spec.corpus for pair in strict_rows(folder.resolve(more), f"{key}.corpus"))
        whole = set_of_rows(path, strict_rows(path, f"{key}.path"), extra)
    else:
        if spec.corpus:
            raise DataError(f"evaluate.local.{position}.corpus is for sets of rows, and {path} has a corpus.jsonl; remove it")
        whole = read_local_set(path, with_corpus=not spec.table)
    return _sampled(whole, spec.max_queries, job.seed)


def check_held_out(job: JobSpec, position: int) -> None:
    """Before long work: as `read_held_out`, but files of rows are only listed.

    Raises:
        DataError: the set is missing or broken.
    """
    assert job.evaluate is not None
    spec, folder = job.evaluate.local[position], RunFolder.of(job)
    path = folder.resolve(spec.path)
    if not (is_known(path) or glob.has_magic(path)):
        read_held_out(job, position)
        return
    for key, files in (("path", path), *(("corpus", folder.resolve(more)) for more in spec.corpus)):
        list_rows(files, f"evaluate.local.{position}.{key}")


def set_of_rows(path: str, rows: Iterator[Pair], extra: Iterator[Pair]) -> LocalSet:
    """A set of the rows' queries; its passages are those of the rows and of `extra`."""
    digest = hashlib.sha256()
    passages: dict[str, str] = {}  # text -> id
    queries: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    tagged = itertools.chain(((True, pair) for pair in rows), ((False, pair) for pair in extra))
    for is_query, pair in tagged:
        content = [is_query, pair.query if is_query else "", pair.positives, pair.negatives]
        digest.update(json.dumps(content).encode() + b"\n")
        for text in (*pair.positives, *pair.negatives):
            passages.setdefault(text, f"p{len(passages)}")
        if is_query:
            query = queries.setdefault(pair.query, f"q{len(queries)}")
            qrels.setdefault(query, {}).update({passages[text]: 1 for text in pair.positives})
    if not queries:
        raise DataError(f"{path} holds no row")
    return LocalSet(
        path=path,
        version=digest.hexdigest(),
        queries={id_: text for text, id_ in queries.items()},
        passages={id_: text for text, id_ in passages.items()},
        qrels=qrels,
    )


def _sampled(whole: LocalSet, most: int | None, seed: int) -> LocalSet:
    if most is None or len(whole.queries) <= most:
        return whole
    ids = list(whole.queries)
    rows = np.random.default_rng([seed, _SAMPLE]).choice(len(ids), size=most, replace=False)
    chosen = [ids[row] for row in sorted(rows)]
    return replace(
        whole,
        version=hashlib.sha256("\n".join([whole.version, *chosen]).encode()).hexdigest(),
        queries={query: whole.queries[query] for query in chosen},
        qrels={query: whole.qrels[query] for query in chosen},
    )
