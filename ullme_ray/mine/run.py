"""`ullme-ray mine`: the training rows again, with hard negatives that an encoder found. Read `run_mine` first.

Costs one encode of every unique text, and 2 * D floating-point operations for each pair of a query and a passage: the search is
exact. Nothing is written before all is done.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ullme_ray import storage
from ullme_ray.errors import DataError, UllmeError
from ullme_ray.mine.corpus import Corpus, MiningTexts
from ullme_ray.mine.encoder import check_encoder
from ullme_ray.mine.flow import QUERY_BLOCKS, encode_texts, search_passages
from ullme_ray.mine.report import MineReport
from ullme_ray.mine.texts import BLOCK_TEXTS, TextStore
from ullme_ray.model import ensure_base
from ullme_ray.model.tokenizing import PromptName
from ullme_ray.pairs import Source, check_sources, read_sources
from ullme_ray.progress import Progress
from ullme_ray.spec.job import JobSpec, MineSpec
from ullme_ray.spec.run_folder import RunFolder, absolute_paths


def preflight(job: JobSpec) -> None:
    """Fails before any long work: no data, no corpus, no encoder, or an output that cannot be written or would replace input.

    Raises:
        DataError: a file is missing, or is input and output at once.
        ModelError: the encoder cannot be had.
        StorageError: the output cannot be written.
    """
    mine = _section(job)
    check_sources(job)
    if (corpus := _corpus(job, mine)) is not None:
        corpus.files()
    check_encoder(job, mine.encoder)
    outputs = _outputs(job, mine)
    inputs = {file.path for path in _input_paths(job, mine) for file in storage.list_files(path)}
    if same := sorted(inputs & set(outputs)):
        raise DataError(f"mine.output: {same[0]} is among the files that are read; write elsewhere, or narrow the glob")
    storage.check_writable(os.path.dirname(outputs[0]))


def run_mine(job: JobSpec) -> MineReport:
    """Writes `mine.output` and tells what is in it. Ray must be initialised.

    Raises:
        DataError: the data cannot be read, or no row got a single negative.
        ModelError: the encoder cannot be loaded.
        MineError: its vectors are not finite, or a process ended again and again.
    """
    started = time.monotonic()
    job = absolute_paths(job)  # Ray's workers have their own working folder
    mine = _section(job)
    if mine.encoder.base == "base":
        ensure_base(_reading(job))
    sources = read_sources(_reading(job))
    corpus = _corpus(job, mine)
    with tempfile.TemporaryDirectory(prefix="ullme_mine_") as name:
        scratch = Path(name)
        texts = MiningTexts(sources, corpus.passages() if corpus else None, scratch)
        found, fingerprint = _mine(job, mine, texts)
        files = [_write(source, texts, found, scratch / f"{i}.jsonl") for i, source in enumerate(sources)]
        counts = _Counts.sum(counts for _, counts in files)
        if not counts.negatives:
            raise DataError(
                f"none of {counts.rows} rows got a negative out of {texts.num_candidates} passages; lower mine.skip_first = "
                f"{mine.skip_first}, loosen mine.margin and mine.ratio, or name a larger mine.corpus"
            )
        outputs = _outputs(job, mine)
        for (file, _), path in zip(files, outputs):
            storage.put_file(file, path)
    report = MineReport(
        rows=counts.rows,
        queries=len(texts.queries),
        passages=texts.num_candidates,
        negatives=counts.negatives,
        rows_short=counts.rows_short,
        rows_without=counts.rows_without,
        mean_positive_score=counts.positive_scores / counts.positives,
        mean_negative_score=counts.negative_scores / counts.negatives,
        rows_rejected=sum(sum(source.rejected.values()) for source in sources),
        corpus_rejected=corpus.num_rejected if corpus else 0,
        encoder=mine.encoder.base,
        fingerprint=fingerprint,
        seconds=time.monotonic() - started,
        outputs=tuple(outputs),
    )
    # `_` keeps it out of globs over the folder.
    place = storage.join(os.path.dirname(outputs[0]), f"_{Path(mine.output).stem}.report.json")
    storage.write_text(place, json.dumps(asdict(report), indent=2) + "\n")
    return report


def _section(job: JobSpec) -> MineSpec:
    if job.mine is None:
        raise UllmeError("the job has no mine section; add mine: {}")
    return job.mine


def _reading(job: JobSpec) -> JobSpec:
    """The job as its rows are read here: without negatives or scores, which they are about to get, none is left out."""
    assert job.train is not None
    objective = job.train.objective.model_copy(update={"distill_weight": 0.0})
    return job.model_copy(update={"train": job.train.model_copy(update={"objective": objective, "negatives_per_query": 0})})


def _corpus(job: JobSpec, mine: MineSpec) -> Corpus | None:
    return Corpus.of(mine.corpus, RunFolder.of(job).resolve(mine.corpus.path)) if mine.corpus else None


def _input_paths(job: JobSpec, mine: MineSpec) -> list[str]:
    assert job.train is not None
    paths = [source.path for source in job.train.data] + ([mine.corpus.path] if mine.corpus else [])
    return [RunFolder.of(job).resolve(path) for path in paths]


def _outputs(job: JobSpec, mine: MineSpec) -> list[str]:
    """One file a source, since each source has a weight of its own."""
    assert job.train is not None
    path = RunFolder.of(job).resolve(mine.output)
    if len(job.train.data) == 1:
        return [path]
    return [f"{path.removesuffix('.jsonl')}-{position}.jsonl" for position in range(len(job.train.data))]


@dataclass(frozen=True)
class _Found:
    """What the search gave, over all queries."""

    passages: np.ndarray  # (Q, N), -1 where there are too few
    scores: np.ndarray  # (Q, N)
    positive_scores: np.ndarray  # by `MiningTexts.place`


def _mine(job: JobSpec, mine: MineSpec, texts: MiningTexts) -> tuple[_Found, str]:
    """Encodes and searches.

    Returns:
        What was found, and the encoder's fingerprint.
    """
    stores: dict[PromptName, TextStore] = {"passage": texts.passages, "query": texts.queries}
    blocks: dict[PromptName, list[Any]] = {prompt: [None] * store.num_blocks for prompt, store in stores.items()}
    fingerprint, done = "", 0
    with Progress("mine: encode", len(texts.passages) + len(texts.queries), unit="texts") as bar:
        bar.update(0)
        for prompt, reference, encoded in encode_texts(job, mine, stores):
            blocks[prompt][encoded.block] = reference
            fingerprint = encoded.fingerprint
            done += len(encoded.vectors)
            bar.update(done)
    num_queries, together = len(texts.queries), QUERY_BLOCKS * BLOCK_TEXTS
    marked = [texts.marked(first, min(together, num_queries - first)) for first in range(0, num_queries, together)]
    passages = np.full((num_queries, mine.negatives_per_query), -1, dtype=np.int64)
    scores = np.zeros(passages.shape, dtype=np.float32)
    positive_scores: dict[int, np.ndarray] = {}
    done = 0
    with Progress("mine: search", num_queries, unit="queries") as bar:
        bar.update(0)
        for chosen in search_passages(mine, job.seed, marked, blocks["query"], blocks["passage"], texts.num_candidates):
            rows = slice(chosen.first_query, chosen.first_query + len(chosen.passages))
            passages[rows], scores[rows] = chosen.passages, chosen.scores
            positive_scores[chosen.first_query] = chosen.positive_scores
            done += len(chosen.passages)
            bar.update(done)
    assert done == num_queries, f"{num_queries} queries went in, {done} came out"
    return _Found(passages, scores, np.concatenate([positive_scores[first] for first in sorted(positive_scores)])), fingerprint


@dataclass
class _Counts:
    """Of one output file."""

    rows: int = 0
    rows_short: int = 0
    rows_without: int = 0
    positives: int = 0
    negatives: int = 0
    positive_scores: float = 0.0
    negative_scores: float = 0.0

    @classmethod
    def sum(cls, parts: Iterator[_Counts]) -> _Counts:
        total = cls()
        for part in parts:
            for name, value in vars(part).items():
                setattr(total, name, getattr(total, name) + value)
        return total


def _write(source: Source, texts: MiningTexts, found: _Found, file: Path) -> tuple[Path, _Counts]:
    """The source's rows in their order, with the negatives found in place of those they had."""
    counts = _Counts()
    with file.open("w", encoding="utf-8") as stream:
        for pair in source.pairs:
            query = texts.queries.number(pair.query)
            assert query is not None, "the sources changed while they were read"
            numbers = [texts.passages.number(positive) for positive in pair.positives]
            positive_scores = [float(found.positive_scores[texts.place(query, n)]) for n in numbers if n is not None]
            there = found.passages[query] >= 0
            negatives = [texts.passages[int(number)] for number in found.passages[query][there]]
            negative_scores = [float(score) for score in found.scores[query][there]]
            row = {
                "query": pair.query,
                "positives": list(pair.positives),
                "negatives": negatives,
                "scores": [*positive_scores, *negative_scores],
            }
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            counts.rows += 1
            counts.rows_short += len(negatives) < len(there)
            counts.rows_without += not negatives
            counts.positives += len(positive_scores)
            counts.negatives += len(negatives)
            counts.positive_scores += sum(positive_scores)
            counts.negative_scores += sum(negative_scores)
    return file, counts
