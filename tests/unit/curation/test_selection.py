"""Which queries are labelled next."""

from __future__ import annotations

import numpy as np
import pytest

from services.curation.selection import comparable, distance_to_nearest, select_queries, uniform_count


def _rows(rng: np.random.Generator, n: int = 60, d: int = 5) -> np.ndarray:
    return rng.standard_normal((n, d))


def test_the_same_seed_chooses_the_same_queries() -> None:
    rows, labelled = _rows(np.random.default_rng(1)), _rows(np.random.default_rng(2), 7)
    runs = [
        select_queries(rows, labelled, count=12, rng=np.random.default_rng(3)) for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert len({one.index for one in runs[0]}) == 12


def test_never_two_queries_of_one_group() -> None:
    rows = _rows(np.random.default_rng(1))
    groups = np.arange(60) // 4
    chosen = select_queries(
        rows, rows[:0], count=40, drawn=[3, 50], rng=np.random.default_rng(0), groups=groups
    )
    assert len(chosen) == 15  # as many as there are groups
    assert len({int(groups[one.index]) for one in chosen}) == 15


def test_prefers_what_is_far_from_the_labelled() -> None:
    rng = np.random.default_rng(0)
    near, far = rng.standard_normal((90, 4)) * 0.1, 10 + rng.standard_normal((10, 4))
    rows, labelled = np.concatenate([near, far]), rng.standard_normal((20, 4)) * 0.1
    chosen = select_queries(rows, labelled, count=1, rng=rng)
    assert chosen[0].index >= 90
    assert chosen[0].reason == "far"


def test_a_batch_is_spread_out() -> None:
    """Two far clusters: the second choice is of the other one, although the first is as far from the labelled."""
    rng = np.random.default_rng(0)
    clusters = [np.array([50.0, 0]), np.array([0, 50.0])]
    rows = np.concatenate([centre + 0.01 * rng.standard_normal((20, 2)) for centre in clusters])
    for sharpness in (2.0, float("inf")):
        chosen = select_queries(
            rows, np.zeros((3, 2)), count=2, rng=np.random.default_rng(1), sharpness=sharpness
        )
        assert {one.index // 20 for one in chosen} == {0, 1}


def test_disputed_queries_come_first_among_equally_far_ones_and_unknown_ones_never_as_disputed() -> None:
    rng = np.random.default_rng(0)
    rows = np.eye(40)
    disagreement = np.full(40, np.nan)
    disagreement[[5, 9]] = 0.9, 0.8
    chosen = select_queries(
        rows, np.zeros((1, 40)), count=2, rng=rng, disagreement=disagreement, disputed_share=1.0,
        sharpness=float("inf"),
    )  # fmt: skip
    assert [(one.index, one.reason) for one in chosen] == [(5, "disagreement"), (9, "disagreement")]
    more = select_queries(
        rows, np.zeros((1, 40)), count=4, rng=rng, disagreement=disagreement, disputed_share=1.0
    )
    assert [one.reason for one in more] == ["disagreement", "disagreement", "far", "far"]


def test_what_was_drawn_before_comes_first_and_the_rest_keeps_its_distance() -> None:
    rows = np.concatenate([np.tile([50.0, 0], (20, 1)), np.tile([0, 50.0], (20, 1))])
    chosen = select_queries(rows, np.zeros((3, 2)), count=2, drawn=[7], rng=np.random.default_rng(1))
    assert [one.reason for one in chosen] == ["uniform", "far"]
    assert chosen[0].index == 7 and chosen[1].index >= 20


def test_a_share_that_is_no_whole_number_is_right_on_average() -> None:
    rng = np.random.default_rng(4)
    found = [uniform_count(3, 0.25, rng) for _ in range(4000)]
    assert set(found) == {0, 1} and np.mean(found) == pytest.approx(0.75, abs=0.03)
    assert (uniform_count(8, 0.0, rng), uniform_count(8, 1.0, rng), uniform_count(0, 0.5, rng)) == (0, 8, 0)


@pytest.mark.parametrize("count", [0, -1])
def test_nothing_is_chosen_of_nothing(count: int) -> None:
    rng = np.random.default_rng(0)
    assert select_queries(np.zeros((5, 2)), np.zeros((0, 2)), count=count, rng=rng) == []
    assert select_queries(np.zeros((0, 2)), np.zeros((0, 2)), count=3, rng=rng) == []


def test_distances_are_to_the_nearest() -> None:
    rows, others = np.array([[0.0, 0], [3, 4]]), np.array([[0.0, 1], [3, 4]])
    assert distance_to_nearest(rows, others) == pytest.approx([1.0, 0.0])
    assert np.isinf(distance_to_nearest(rows, others[:0])).all()


def test_comparable_rows_do_not_depend_on_units() -> None:
    rng = np.random.default_rng(0)
    rows, others = _rows(rng), _rows(rng, 9)
    scale = np.array([1, 1000.0, 0.01, 5, 7])
    plain, scaled = comparable(rows, others), comparable(rows * scale, others * scale)
    assert np.allclose(plain[0], scaled[0], atol=1e-3)
    assert np.allclose(np.linalg.norm(plain[1], axis=1), 1.0, atol=1e-5)
