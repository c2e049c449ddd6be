import numpy as np
import pytest

from byline.teachers.ranking import Ranking, summarise


def ranking(replicates: np.ndarray, **options) -> Ranking:
    return summarise(replicates, np.arange(replicates.shape[-1]), 8, "t", "given", **options)


def test_an_item_with_fewer_replicates_is_judged_by_those_it_has() -> None:
    values = np.random.default_rng(0).normal(size=(8, 3))
    values[3:, 1] = np.nan
    values[1:, 2] = np.nan
    found = ranking(values)
    assert found.tau == pytest.approx([values[:, 0].mean(), values[:3, 1].mean(), values[0, 2]])
    assert found.standard_error[:2] == pytest.approx(
        [values[:, 0].std(ddof=1) / np.sqrt(8), values[:3, 1].std(ddof=1) / np.sqrt(3)]
    )
    assert np.isnan(found.standard_error[2])
    assert found.tau_halves[:, 1] == pytest.approx([values[[0, 2], 1].mean(), values[1, 1]])
    assert found.tau_halves[:, 2] == pytest.approx([values[0, 2]] * 2)


def test_the_standard_error_is_the_scatter_of_tau_over_fresh_noise() -> None:
    rng = np.random.default_rng(1)
    found = [ranking(rng.normal(size=(8, 50))) for _ in range(200)]
    scatter = np.stack([one.tau for one in found]).std(axis=0).mean()
    assert np.mean([one.standard_error for one in found]) == pytest.approx(scatter, rel=0.1)


def test_flips_take_the_better_orientation_as_a_whole_or_the_mean() -> None:
    both = np.random.default_rng(2).normal(size=(2, 8, 40))
    upright, flipped = ranking(both[0]), ranking(both[1])
    most, mean = ranking(both, flips="max"), ranking(both, flips="mean")
    assert np.array_equal(most.tau, np.maximum(upright.tau, flipped.tau))
    better = np.where(upright.tau >= flipped.tau, upright.standard_error, flipped.standard_error)
    assert np.array_equal(most.standard_error, better)
    assert np.allclose(mean.tau, (upright.tau + flipped.tau) / 2)
    # Each half chooses for itself: a half that knew of the other's noise would not be disjoint from it.
    assert np.array_equal(most.tau_halves, np.maximum(upright.tau_halves, flipped.tau_halves))
    assert (most.samples == 16).all() and (upright.samples == 8).all() and most.samples.dtype == np.int32
