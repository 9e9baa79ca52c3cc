"""Which rows make up step t: a function of the seed and t alone.

So a run resumes at the exact sample from the step number, on any number of workers. One source per global batch, mixed by
weight; each source is walked in seeded permutations of its rows, epoch after epoch, without dropping any. Memory: 4 bytes per
row and epoch under way; the rows themselves stay on disk.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ullme_ray.errors import DataError
from ullme_ray.pairs import Pair, Source
from ullme_ray.spec.job import TrainSpec
from ullme_ray.train.collate import Example

_CHOICE, _ORDER, _PASSAGES = 1, 2, 3  # independent random streams of one seed


class BatchSampler:
    """Examples of any step and rank.

    Args:
        sources: rows of every `train.data` entry, none of them empty.
        train: batch size, passages per query, number of steps.
        seed: of everything random here.
    """

    def __init__(self, sources: Sequence[Source], train: TrainSpec, *, seed: int) -> None:
        self.train = train
        self.seed = seed
        self.sources = sources
        weights = np.array([source.weight for source in sources])
        generator = np.random.default_rng([seed, _CHOICE])
        self._source_of_step = generator.choice(len(sources), size=train.max_steps, p=weights / weights.sum())
        self._permutations: dict[tuple[int, int], np.ndarray] = {}

    def examples(self, step: int, first_row: int, num_rows: int) -> list[Example]:
        """Rows [first_row, first_row + num_rows) of the global batch of `step` (from 0)."""
        source = int(self._source_of_step[step])
        batches_before = int((self._source_of_step[:step] == source).sum())
        start = batches_before * self.train.global_batch_size + first_row
        return [self._example(source, start + i, first_row + i) for i in range(num_rows)]

    def _example(self, number: int, position: int, row: int) -> Example:
        """The example at a position in a source's endless walk."""
        source = self.sources[number]
        epoch, place = divmod(position, len(source.pairs))
        pair = source.pairs[int(self._permutation(number, epoch)[place])]
        generator = np.random.default_rng([self.seed, _PASSAGES, number, position])
        wanted = self.train.negatives_per_query
        chosen = _choose(len(pair.positives), self.train.positives_per_query, generator)
        rejected = _choose(len(pair.negatives), min(wanted, len(pair.negatives)), generator)
        negatives = [pair.negatives[i] for i in rejected]
        while len(negatives) < wanted:
            negatives.append(self._other_passage(source.pairs, pair, generator))
        scores = None
        if self.train.objective.distill_weight > 0:
            assert pair.scores is not None  # pairs/ rejects such rows,
            assert len(rejected) == wanted  # and those that would need unscored passages
            scores = tuple(pair.scores[i] for i in [*chosen, *(len(pair.positives) + i for i in rejected)])
        positives = tuple(pair.positives[i] for i in chosen)
        return Example(row, pair.query, positives, tuple(negatives), scores, source.prompts, source.in_batch_negatives)

    def _permutation(self, source: int, epoch: int) -> np.ndarray:
        key = (source, epoch)
        if key not in self._permutations:
            self._permutations.pop((source, epoch - 2), None)  # a batch reaches into two epochs, or all of many short ones
            if len(self._permutations) > 4 * len(self.sources):
                self._permutations.clear()
            rows = np.arange(len(self.sources[source].pairs), dtype=np.uint32)
            self._permutations[key] = np.random.default_rng([self.seed, _ORDER, source, epoch]).permutation(rows)
        return self._permutations[key]

    @staticmethod
    def _other_passage(pairs: Sequence[Pair], pair: Pair, generator: np.random.Generator) -> str:
        for _ in range(100):
            other = pairs[int(generator.integers(len(pairs)))]
            if other.query != pair.query and other.positives[0] not in pair.positives:
                return other.positives[0]
        raise DataError("a source repeats one query or passage so often that no other one was found as negative in 100 draws")


def _choose(size: int, count: int, generator: np.random.Generator) -> list[int]:
    """`count` numbers below `size`: without repetition while there are enough, all of them again and again where not."""
    chosen: list[int] = []
    while len(chosen) < count:
        chosen += generator.permutation(size)[: count - len(chosen)].tolist()
    return chosen
