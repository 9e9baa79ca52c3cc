"""Which rows make up step t: a function of the seed and t alone.

So a run resumes at the exact sample from the step number, on any number of workers. One source per global batch, mixed by
weight; each source is walked in seeded permutations of its rows, epoch after epoch, without dropping any.
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
        sources: rows of every `train.data` entry.
        train: batch size, passages per query, number of steps.
        seed: of everything random here.

    Raises:
        DataError: no row is left with enough hard negatives.
    """

    def __init__(self, sources: Sequence[Source], train: TrainSpec, *, seed: int) -> None:
        self.train = train
        self.seed = seed
        self.rows: list[list[Pair]] = []
        for position, source in enumerate(sources):
            pairs = source.pairs
            if train.missing_negatives == "reject":
                pairs = [pair for pair in pairs if len(pair.negatives) >= train.negatives_per_query]
            if not pairs:
                raise DataError(
                    f"train.data.{position}.path = {source.path}: no row has {train.negatives_per_query} hard negatives; lower "
                    f"train.negatives_per_query, or set train.missing_negatives: sample"
                )
            self.rows.append(pairs)
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

    def _example(self, source: int, position: int, row: int) -> Example:
        """The example at a position in a source's endless walk."""
        pairs = self.rows[source]
        epoch, place = divmod(position, len(pairs))
        pair = pairs[self._permutation(source, epoch)[place]]
        generator = np.random.default_rng([self.seed, _PASSAGES, source, position])
        positives = _choose(pair.positives, self.train.positives_per_query, generator)
        negatives = _choose(pair.negatives, min(self.train.negatives_per_query, len(pair.negatives)), generator)
        while len(negatives) < self.train.negatives_per_query:
            negatives.append(self._other_passage(pairs, pair, generator))
        return Example(row, pair.query, tuple(positives), tuple(negatives))

    def _permutation(self, source: int, epoch: int) -> np.ndarray:
        key = (source, epoch)
        if key not in self._permutations:
            if len(self._permutations) > 4 * len(self.rows):
                self._permutations.clear()
            self._permutations[key] = np.random.default_rng([self.seed, _ORDER, source, epoch]).permutation(
                len(self.rows[source])
            )
        return self._permutations[key]

    @staticmethod
    def _other_passage(pairs: list[Pair], pair: Pair, generator: np.random.Generator) -> str:
        for _ in range(100):
            other = pairs[int(generator.integers(len(pairs)))]
            if other.query != pair.query and other.positives[0] not in pair.positives:
                return other.positives[0]
        raise DataError("a source repeats one query or passage so often that no other one was found as negative in 100 draws")


def _choose(texts: tuple[str, ...], count: int, generator: np.random.Generator) -> list[str]:
    """`count` texts: without repetition while there are enough, the whole set again and again where not."""
    chosen: list[str] = []
    while len(chosen) < count:
        chosen += [texts[i] for i in generator.permutation(len(texts))[: count - len(chosen)]]
    return chosen
