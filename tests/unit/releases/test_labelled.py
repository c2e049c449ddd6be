"""Queries far from everything labelled are told apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from byline.errors import ReleaseCorrupt
from byline.releases.labelled import MOST_ROWS, LabelledPlaces
from byline.releases.loader import load_release


def _places(rng: np.random.Generator, n: int = 200, d: int = 6) -> tuple[LabelledPlaces, np.ndarray]:
    """Labelled queries lie in one cone, on a scale of their own in each column."""
    rows = (np.array([3.0] * 3 + [0.0] * 3) + 0.3 * rng.standard_normal((n, d))).astype(np.float32)
    found = LabelledPlaces.of(rows * np.array([1, 100, 1, 1, 1, 0.01], np.float32), list(range(n)), seed=0)
    assert found is not None
    return found, rows


def test_few_of_the_same_kind_are_far_and_all_of_another_kind_are() -> None:
    rng = np.random.default_rng(0)
    plane = np.zeros((300, 8), np.float32)
    plane[:, :2] = rng.standard_normal((300, 2))
    places = LabelledPlaces.of(plane[:250], list(range(250)), seed=0)
    assert places is not None
    usual = [places.distance(row) > places.limit for row in plane[250:]]
    assert np.mean(usual) < 0.25
    other = np.zeros((20, 8), np.float32)
    other[:, 2:] = rng.standard_normal((20, 6))
    assert all(places.distance(row) > places.limit for row in other)


def test_distance_to_a_labelled_query_itself_is_nothing_whatever_the_units() -> None:
    rng = np.random.default_rng(0)
    places, rows = _places(rng)
    assert places.distance(rows[7] * np.array([1, 100, 1, 1, 1, 0.01], np.float32)) < 1e-2


def test_other_seeds_of_one_prompt_do_not_make_the_limit_small() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((60, 6)).astype(np.float32)
    twice, groups = np.concatenate([rows, rows + 1e-4]), [*range(60), *range(60)]
    once = LabelledPlaces.of(rows, groups[:60], seed=0)
    both = LabelledPlaces.of(twice, groups, seed=0)
    assert once is not None and both is not None and both.limit == pytest.approx(once.limit, rel=0.05)


def test_too_few_groups_say_nothing_and_many_rows_are_thinned() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((MOST_ROWS + 100, 4)).astype(np.float32)
    assert LabelledPlaces.of(rows[:100], [number % 10 for number in range(100)], seed=0) is None
    many = LabelledPlaces.of(rows, list(range(len(rows))), seed=0)
    assert many is not None and len(many.rows) == MOST_ROWS


def test_what_was_saved_is_what_is_loaded_and_other_widths_are_refused(tmp_path: Path) -> None:
    places, rows = _places(np.random.default_rng(0))
    places.save(tmp_path / "labelled.safetensors")
    loaded = LabelledPlaces.load(tmp_path / "labelled.safetensors", 6)
    assert loaded.distance(rows[0] + 1) == pytest.approx(places.distance(rows[0] + 1))
    assert loaded.limit == pytest.approx(places.limit)
    for path, width in ((tmp_path / "labelled.safetensors", 7), (tmp_path / "nothing.safetensors", 6)):
        with pytest.raises(ReleaseCorrupt):
            LabelledPlaces.load(path, width)


def test_a_release_carries_them_and_one_without_says_nothing(build: Callable[..., Path]) -> None:
    rows = np.random.default_rng(0).standard_normal((40, 16)).astype(np.float32)
    places = LabelledPlaces.of(rows, list(range(40)), seed=0)
    assert places is not None
    loaded = load_release(build(labelled=places)).labelled
    assert loaded is not None and loaded.distance(rows[0]) == pytest.approx(0.0, abs=2e-3)
    assert load_release(build(release_id="plain")).labelled is None
