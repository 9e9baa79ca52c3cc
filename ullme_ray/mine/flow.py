"""The two Ray Data pipelines: a pool of actors encodes blocks of texts, then tasks search all passages for blocks of queries.

Vectors stay in Ray's object store, which spills to disk, as float32: 4 * D bytes a text. Any node can take any block, and a
search task holds one tile of passages at a time.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray

from ullme_ray.errors import MineError, UllmeError
from ullme_ray.mine.encoder import open_miner
from ullme_ray.mine.search import Marked, choose_negatives, rank
from ullme_ray.mine.texts import BLOCK_TEXTS, TextStore
from ullme_ray.model import Encoder
from ullme_ray.model.tokenizing import PromptName
from ullme_ray.ray_data import Attempts, Stage, configure_ray_data, explained, pool_limit, run_beside
from ullme_ray.spec.job import JobSpec, MineSpec

QUERY_BLOCKS = 4  # blocks of texts searched for together: 4096 queries
TILE_BLOCKS = 8  # blocks of texts searched at once: 8192 passages
STAGE = Stage(
    error=MineError,
    pool="mine.actors",
    work="mining",
    next_run="nothing was written; the next run starts over",
    lighter="lower mine.tokens_per_batch or mine.depth",
)
Row = dict[str, Any]


@dataclass(frozen=True)
class Encoded:
    """Vectors of one block of texts."""

    block: int
    vectors: np.ndarray  # (n, D) float32
    fingerprint: str  # of the model


@dataclass(frozen=True)
class Chosen:
    """Negatives of consecutive queries, and the scores of their positives in the order of `Marked`."""

    first_query: int
    passages: np.ndarray  # (Q, N), -1 where there are too few
    scores: np.ndarray  # (Q, N)
    positive_scores: np.ndarray


@dataclass(frozen=True)
class _SearchContext:
    """What every search task needs. Vectors as references, each to an Encoded."""

    mine: MineSpec
    seed: int
    query_blocks: list[Any]
    passage_blocks: list[Any]
    num_candidates: int


def encode_texts(job: JobSpec, mine: MineSpec, texts: dict[PromptName, TextStore]) -> Iterator[tuple[PromptName, Any, Encoded]]:
    """(prompt, reference, encoded block) of all texts, in any order.

    Raises:
        UllmeError: the model cannot be loaded, or gives no finite vectors.
    """
    places = [(prompt, block) for prompt, store in texts.items() for block in range(store.num_blocks)]
    most = pool_limit(STAGE, mine.actors, len(places))
    inputs = [
        ray.put(pa.table({"place": [place], "work": [pickle.dumps((prompt, texts[prompt].block(block)))]}))
        for place, (prompt, block) in enumerate(places)
    ]
    fingerprints = set()
    for reference, encoded in run_beside(STAGE, _encode_flow, inputs, job, mine, most):
        fingerprints.add(encoded.fingerprint)
        if len(fingerprints) > 1:
            raise MineError(
                f"the machines of this cluster load different models (fingerprints {', '.join(sorted(fingerprints))}) for "
                f"mine.encoder = {mine.encoder.base}; give all the same folder, or keep it on s3://"
            )
        yield places[encoded.block][0], reference, Encoded(places[encoded.block][1], encoded.vectors, encoded.fingerprint)


def _encode_flow(inputs: list[Any], job: JobSpec, mine: MineSpec, most_actors: int, attempts: Attempts) -> Iterator[Encoded]:
    import ray.data

    configure_ray_data()
    encoded = ray.data.from_arrow_refs(inputs).map(
        cast(Any, _EncodeActor),  # Ray's hints know functions of one argument only
        fn_constructor_args=(job, mine, attempts),
        compute=ray.data.ActorPoolStrategy(min_size=mine.actors.min, max_size=most_actors),
        num_cpus=mine.actors.cpus_per_actor,
        num_gpus=mine.actors.gpus_per_actor,
    )
    yield from _results(encoded)


def _results(dataset: Any) -> Iterator[Any]:
    """What the rows of a finished pipeline hold.

    Raises:
        UllmeError: whatever a step raised on purpose (it travels in the row, for Ray Data would bury it in its own error).
    """
    from ray.data.exceptions import ExecutionTimeoutError

    try:
        for row in dataset.iter_rows():
            result = pickle.loads(row["result"])
            if isinstance(result, UllmeError):
                raise result
            yield result
    except (ray.exceptions.RayError, ExecutionTimeoutError) as error:
        raise explained(STAGE, error) from error


def _device(mine: MineSpec) -> str:
    """The device of this process, whose threads are limited to its share of the machine."""
    if mine.actors.gpus_per_actor:
        return "cuda"
    import torch

    torch.set_num_threads(mine.actors.cpus_per_actor)
    return "cpu"


class _EncodeActor:
    """Holds the model; one call encodes one block."""

    def __init__(self, job: JobSpec, mine: MineSpec, attempts: Attempts) -> None:
        self._mine = mine
        self._attempts = attempts
        self._encoder: Encoder | UllmeError
        try:
            with attempts.at(f"load in {ray.get_runtime_context().get_actor_id()}", shown="loading the model"):
                self._encoder = open_miner(job, mine.encoder, device=_device(mine))
        except UllmeError as error:
            self._encoder = error  # goes out with the first block; Ray would start the actor again and again

    def __call__(self, row: Row) -> Row:
        try:
            with self._attempts.at(f"encode {row['place']}", shown=f"encoding {BLOCK_TEXTS} texts"):
                result: Encoded | UllmeError = self._encode(int(row["place"]), *pickle.loads(row["work"]))
        except UllmeError as error:
            result = error
        return {"result": pickle.dumps(result)}

    def _encode(self, place: int, prompt: PromptName, texts: list[str]) -> Encoded:
        if isinstance(self._encoder, UllmeError):
            raise self._encoder
        vectors = self._encoder.encode(texts, prompt, tokens_per_batch=self._mine.tokens_per_batch)
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(bad):
            name, text = self._mine.encoder.base, texts[bad[0]][:80]
            raise MineError(f"mine.encoder = {name} gives a vector that is not finite for the text {text!r}")
        return Encoded(place, vectors, self._encoder.fingerprint)


def search_passages(
    mine: MineSpec, seed: int, marked: list[Marked], query_blocks: list[Any], passage_blocks: list[Any], num_candidates: int
) -> Iterator[Chosen]:
    """The negatives of all queries, in any order.

    Args:
        marked: of every `QUERY_BLOCKS` blocks of queries.
        query_blocks: references to the Encoded queries, in order; `passage_blocks` alike.

    Raises:
        UllmeError: with Ray's reason.
    """
    context = _SearchContext(mine, seed, query_blocks, passage_blocks, num_candidates)
    most = pool_limit(STAGE, mine.actors, len(marked))
    for _, chosen in run_beside(STAGE, _search_flow, marked, context, most):
        yield chosen


def _search_flow(marked: list[Marked], context: _SearchContext, most_tasks: int, attempts: Attempts) -> Iterator[Chosen]:
    import ray.data

    configure_ray_data()
    actors = context.mine.actors
    rows = [{"place": place, "work": pickle.dumps(pairs)} for place, pairs in enumerate(marked)]
    found = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        cast(Any, _search_step),
        fn_args=(context, attempts),
        compute=ray.data.TaskPoolStrategy(size=most_tasks),
        num_cpus=actors.cpus_per_actor,
        num_gpus=actors.gpus_per_actor,
    )
    yield from _results(found)


def _search_step(row: Row, context: _SearchContext, attempts: Attempts) -> Row:
    place = int(row["place"])
    try:
        with attempts.at(f"search {place}", shown=f"searching for {QUERY_BLOCKS * BLOCK_TEXTS} queries"):
            result: Chosen | UllmeError = _search(place, pickle.loads(row["work"]), context)
    except UllmeError as error:
        result = error
    return {"result": pickle.dumps(result)}


def _search(place: int, marked: Marked, context: _SearchContext) -> Chosen:
    mine = context.mine
    first_query = place * QUERY_BLOCKS * BLOCK_TEXTS
    ranking = rank(
        _vectors(context.query_blocks[place * QUERY_BLOCKS : (place + 1) * QUERY_BLOCKS]),
        (
            (start * BLOCK_TEXTS, _vectors(context.passage_blocks[start : start + TILE_BLOCKS]))
            for start in range(0, len(context.passage_blocks), TILE_BLOCKS)
        ),
        marked,
        num_candidates=context.num_candidates,
        depth=mine.depth,
        device=_device(mine),
    )
    passages, scores = choose_negatives(ranking, marked, mine, seed=context.seed, first_query=first_query)
    return Chosen(first_query, passages, scores, ranking.marked_scores[marked.is_positive])


def _vectors(references: list[Any]) -> np.ndarray:
    return np.concatenate([encoded.vectors for encoded in ray.get(references)])
