"""Held-out retrieval while training runs: the ranks themselves encode, each its share, and none waits for another program.

Cost: one forward pass over at most max_queries + max_passages texts, divided over the ranks, each time.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from ullme_ray.errors import DataError
from ullme_ray.model.budget import token_budget_batches
from ullme_ray.model.encode import pad_tokens
from ullme_ray.model.tokenizing import TextTokenizer, Tokens
from ullme_ray.retrieval.local_set import LocalSet, read_local_set
from ullme_ray.retrieval.metrics import mean_scores, score_run
from ullme_ray.retrieval.topk import top_k
from ullme_ray.spec.job import JobSpec, ValidationSpec
from ullme_ray.spec.run_folder import RunFolder
from ullme_ray.train.collectives import all_gather, world
from ullme_ray.train.engine import Engine

TOKENS_PER_BATCH = 8192
_SAMPLE = 5  # an independent random stream of the job's seed; training has 1 to 3, mining 4


class Validator:
    """nDCG@k on a sample of a held-out set.

    Args:
        job: with `train.validation`.
        tokenizer: with the job's prompts.

    Raises:
        DataError: the set cannot be read.
    """

    def __init__(self, job: JobSpec, tokenizer: TextTokenizer) -> None:
        assert job.train is not None
        assert job.train.validation is not None
        self.settings = job.train.validation
        self.sample = sample_set(read_validation_set(job), self.settings, seed=job.seed)
        self._queries = tokenizer.tokenize(list(self.sample.queries.values()), "query")
        self._passages = tokenizer.tokenize(list(self.sample.passages.values()), "passage")
        self._pad_id = tokenizer.pad_id

    def measure(self, engine: Engine) -> float:
        """nDCG@k of the weights as they are; the same number on every rank. A collective call."""
        engine.module.eval()
        try:
            queries, passages = self._encode(engine, self._queries), self._encode(engine, self._passages)
        finally:
            engine.module.train()
        found = torch.zeros(1, dtype=torch.float64)
        rank, world_size = world()
        if rank == 0:
            ids = np.array(list(self.sample.passages))
            hits = top_k(queries, [(ids, passages)], self.settings.k)
            run = {query: dict(best) for query, best in zip(self.sample.queries, hits)}
            measure = f"ndcg@{self.settings.k}"
            found[0] = mean_scores(score_run(self.sample.qrels, run, [measure]))[measure]
        if world_size > 1:
            found = found.to(engine.device)
            dist.broadcast(found, src=0)
        return float(found[0])

    @torch.no_grad()
    def _encode(self, engine: Engine, tokens: Tokens) -> np.ndarray:
        """(N, D) float32. Every rank makes the same number of forward calls, as sharded parameters require."""
        rank, world_size = world()
        batches = list(token_budget_batches([len(ids) for ids in tokens.input_ids], TOKENS_PER_BATCH))
        rounds = -(-len(batches) // world_size)
        vectors: np.ndarray | None = None
        for number in range(rounds):
            shares = [batches[min(number * world_size + r, len(batches) - 1)] for r in range(world_size)]
            batch = pad_tokens(tokens, shares[rank], self._pad_id).to(engine.device)
            embedding = engine(batch)[0]  # (own rows, D)
            widest = max(len(rows) for rows in shares)
            padded = embedding.new_zeros((widest, embedding.shape[1]))
            padded[: len(embedding)] = embedding
            everyone = all_gather(padded).view(world_size, widest, -1).cpu().numpy()
            if vectors is None:
                vectors = np.empty((len(tokens.input_ids), embedding.shape[1]), dtype=np.float32)
            for rows, part in zip(shares, everyone):
                vectors[rows] = part[: len(rows)]
        assert vectors is not None
        return vectors


def read_validation_set(job: JobSpec) -> LocalSet:
    """The job's validation set, whole.

    Raises:
        DataError: naming the key.
    """
    assert job.train is not None
    assert job.train.validation is not None
    path = RunFolder.of(job).resolve(job.train.validation.path)
    try:
        return read_local_set(path)
    except DataError as error:
        raise DataError(f"train.validation.path = {job.train.validation.path}: {error}") from error


def sample_set(whole: LocalSet, settings: ValidationSpec, *, seed: int) -> LocalSet:
    """At most max_queries queries, with all that is relevant to them and further passages up to max_passages; seeded."""
    generator = np.random.default_rng([seed, _SAMPLE])
    queries = _choose(sorted(whole.queries), settings.max_queries, generator)
    qrels = {query: whole.qrels[query] for query in queries}
    relevant = {passage for judged in qrels.values() for passage in judged if passage in whole.passages}
    others = _choose(sorted(whole.passages.keys() - relevant), max(0, settings.max_passages - len(relevant)), generator)
    return LocalSet(
        path=whole.path,
        version=whole.version,
        queries={query: whole.queries[query] for query in queries},
        passages={passage: whole.passages[passage] for passage in sorted([*relevant, *others])},
        qrels=qrels,
    )


def _choose(ids: list[str], most: int, generator: np.random.Generator) -> list[str]:
    return ids if len(ids) <= most else [ids[i] for i in sorted(generator.choice(len(ids), size=most, replace=False))]
