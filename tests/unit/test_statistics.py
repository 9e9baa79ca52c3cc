"""Intervals and tests over per-query values: against exact enumeration, other tests, and a computation by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from ullme_ray.retrieval.statistics import holm, interval, paired_p_value


def test_the_p_value_is_that_of_all_sign_flips():
    values = np.random.default_rng(1).normal(0.05, 0.1, size=12)
    flips = np.array([(values * signs).mean() for signs in itertools.product((1, -1), repeat=12)])
    exact = (np.abs(flips) >= abs(values.mean()) - 1e-12).mean()
    assert paired_p_value(values, np.zeros(12)) == pytest.approx(exact)
    assert paired_p_value(np.zeros(12), values) == pytest.approx(exact)


def test_the_p_value_of_many_queries_is_near_that_of_the_paired_t_test():
    draw = np.random.default_rng(2)
    first, second = draw.normal(0.52, 0.3, size=300), draw.normal(0.5, 0.3, size=300)
    assert paired_p_value(first, second) == pytest.approx(stats.ttest_rel(first, second).pvalue, abs=0.02)
    assert paired_p_value(first, second) == paired_p_value(first, second), "seeded"


def test_equal_models_do_not_differ_and_far_ones_do():
    values = np.random.default_rng(3).uniform(size=200)
    assert paired_p_value(values, values) == 1.0
    assert paired_p_value(values + 0.1, values) < 0.001


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    draw = np.random.default_rng(4)
    covered = 0
    for _ in range(200):
        low, high = interval(draw.beta(0.5, 0.5, size=100))  # nDCG is often near 0 or 1
        covered += low <= 0.5 <= high
    assert 180 <= covered <= 199
    low, high = interval(np.array([0.0, 1.0] * 50))
    assert (low, high) == pytest.approx((0.4, 0.6), abs=0.02)


def test_the_interval_of_one_value_or_of_equal_values_is_a_point():
    assert interval(np.array([0.25])) == (0.25, 0.25)
    assert interval(np.full(50, 0.5)) == (0.5, 0.5)


def test_holm_adjusts_as_published():
    """Holm 1979 by hand: 4 x 0.005, 3 x 0.01, 2 x 0.03, and no smaller than the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
