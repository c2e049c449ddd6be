"""Paired bootstrap."""

from __future__ import annotations

import numpy as np
import pytest

from byline.errors import LabelsNotUsable
from byline.evaluation.bootstrap import paired_bootstrap


def test_a_clear_gain_is_significant_and_no_gain_is_not():
    rng = np.random.default_rng(0)
    base = rng.uniform(size=40)
    better = paired_bootstrap(base + 0.1 + 0.05 * rng.normal(size=40), base, seed=1)
    assert better.low > 0 and better.p_value < 0.001 and better.low < better.mean < better.high
    same = paired_bootstrap(base + 0.05 * rng.normal(size=40), base, seed=1)
    assert same.low < 0 < same.high and same.p_value > 0.01


def test_equal_methods_and_repeats_give_the_same_answer():
    base = np.linspace(0, 1, 10)
    assert paired_bootstrap(base, base, seed=0).p_value == 1.0
    other = base[::-1].copy()
    assert paired_bootstrap(other, base, seed=4) == paired_bootstrap(other, base, seed=4)


def test_different_queries_cannot_be_compared():
    with pytest.raises(LabelsNotUsable):
        paired_bootstrap(np.zeros(3), np.zeros(4), seed=0)
