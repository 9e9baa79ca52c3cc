"""How sure a mean over queries is, and whether two models differ: intervals and tests over per-query values.

Intervals are percentile bootstraps over queries; differences are tested by random sign flips of the paired per-query
differences (Smucker et al. 2007 find that test and the bootstrap to agree, and Wilcoxon's not), both scipy's. Where several
pairs are tested, p is also given as Holm's method adjusts it. Seeded: the same values give the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 2_000
FLIPS = 9_999
_BATCH_VALUES = 2**22  # held at a time: about 32 MB
_SEED = 13


def interval(values: np.ndarray) -> tuple[float, float]:
    """Bounds of the mean's 95 % interval; of a single value that value twice.

    Args:
        values: (Q,), one per query.
    """
    if len(values) < 2 or np.ptp(values) == 0:  # scipy warns of both
        return float(values.mean()), float(values.mean())
    found = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, _BATCH_VALUES // len(values)),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    return float(found.low), float(found.high)


def ratio_interval(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Bounds of the 95 % interval of sum(sums) / sum(counts), such as a loss per token over queries of many lengths.

    Args:
        sums: (Q,) and counts: (Q,), one pair per query.
    """
    if len(sums) < 2 or np.ptp(sums / counts) == 0:
        return float(sums.sum() / counts.sum()), float(sums.sum() / counts.sum())
    found = stats.bootstrap(
        (sums.astype(float), counts.astype(float)),
        lambda s, c, axis=-1: s.sum(axis=axis) / c.sum(axis=axis),
        n_resamples=RESAMPLES,
        batch=max(1, _BATCH_VALUES // len(sums)),
        confidence_level=CONFIDENCE,
        method="percentile",
        paired=True,
        vectorized=True,
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    return float(found.low), float(found.high)


def paired_p_value(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided p of the hypothesis that two models do equally well on the same queries.

    Args:
        first: (Q,) and second: (Q,), in the same order of queries.
    """
    differences = first - second
    if not differences.any():
        return 1.0
    return float(
        stats.permutation_test(
            (differences,),
            np.mean,
            permutation_type="samples",
            vectorized=True,
            n_resamples=FLIPS,
            batch=max(1, _BATCH_VALUES // len(differences)),
            rng=np.random.default_rng(_SEED),
        ).pvalue
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for having tested all of them (Holm 1979), in the order given."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for place, position in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[position]))
        adjusted[position] = largest
    return adjusted
