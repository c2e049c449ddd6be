"""An estimate orders the whole corpus by the sketches' inner products, and knows its own noise."""

from __future__ import annotations

import numpy as np
import pytest

from byline.index import FlatIndex
from services.workers.estimation import best_estimates

RNG = np.random.default_rng(0)
IDS = RNG.permutation(10_000)[:300].astype(np.int64)
ITEMS = (1e-3 * RNG.standard_normal((300, 12))).astype(np.float32)
SKETCH = (RNG.standard_normal(12) + 0.3 * RNG.standard_normal((8, 12))).astype(np.float32)
CORPUS = 350
NOBODY = np.empty(0, dtype=np.int64)


@pytest.fixture(scope="module")
def index() -> FlatIndex:
    return FlatIndex.build(IDS, ITEMS)


def expected(exclude: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, tau and standard errors of everything kept, best first, item by item."""
    keep = ~np.isin(IDS, exclude)
    tau = SKETCH.astype(np.float64) @ ITEMS[keep].astype(np.float64).T / CORPUS
    order = np.argsort(-tau.mean(0))
    return IDS[keep][order], tau.mean(0)[order], (tau.std(0, ddof=1) / np.sqrt(8))[order]


def test_tau_and_its_error_are_those_of_the_replicates(index: FlatIndex) -> None:
    ids, tau, error = expected(NOBODY)
    found = best_estimates(SKETCH, index, CORPUS, 20, NOBODY)
    assert [one.item_id for one in found] == ids[:20].tolist()
    np.testing.assert_allclose([one.tau for one in found], tau[:20], rtol=1e-9)
    np.testing.assert_allclose([one.standard_error for one in found], error[:20], rtol=1e-9)


def test_withdrawn_items_are_left_out_before_the_best_are_chosen(index: FlatIndex) -> None:
    gone = expected(NOBODY)[0][:7]
    found = best_estimates(SKETCH, index, CORPUS, 20, gone)
    assert [one.item_id for one in found] == expected(gone)[0][:20].tolist()
    assert len(best_estimates(SKETCH, index, CORPUS, 400, gone)) == 293


def test_one_replicate_has_no_error_and_equal_items_are_ordered_by_id() -> None:
    twins = FlatIndex.build(np.array([9, 3, 6]), np.ones((3, 2), dtype=np.float32))
    found = best_estimates(np.ones((1, 2), dtype=np.float32), twins, 2, 3, NOBODY)
    assert [one.item_id for one in found] == [3, 6, 9]
    assert all(np.isnan(one.standard_error) for one in found)
