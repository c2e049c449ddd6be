"""Candidates of a fit, cells, the reduction of vectors, and the page's blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from byline.errors import InvalidRequest
from byline.evaluation.study_bench import Cell, Fit, choose
from byline.evaluation.study_dimensions import reduction
from byline.evaluation.study_report import put_block, sentence
from byline.evaluation.study_student import StudentSettings
from byline.evaluation.study_tiers import STORAGES, full_scores, stored
from byline.evaluation.study_timing import interleaved

FIT = Fit(StudentSettings(), ("minilm",), candidates=10)


def test_nearest_candidates_are_the_nearest_but_for_the_explored_share() -> None:
    near = np.random.default_rng(0).normal(size=(5, 60)).astype(np.float32)
    top = np.argsort(-near, axis=1)[:, :10]
    plain = choose(near, FIT, np.random.default_rng(1))
    assert all(set(np.flatnonzero(row)) == set(best) for row, best in zip(plain, top, strict=True))
    mixed = choose(near, Fit(FIT.student, FIT.encoders, candidates=10, explored=0.3), np.random.default_rng(1))
    assert (mixed.sum(1) == 10).all()
    for row, best in zip(mixed, top, strict=True):
        assert set(best[:7]) <= set(np.flatnonzero(row))


def test_uniform_candidates_are_uniform() -> None:
    near = np.tile(np.arange(40, dtype=np.float32), (2000, 1))
    counts = choose(near, Fit(FIT.student, FIT.encoders, candidates=10, choice="uniform"),
                    np.random.default_rng(0)).sum(0)  # fmt: skip
    assert abs(counts - 500).max() < 5 * np.sqrt(2000 * 0.25 * 0.75)


def test_the_error_of_a_cell_is_over_queries_and_seeds_apart() -> None:
    cell = Cell("a", {"map": np.array([[0.0, 1.0], [0.2, 1.2]])})
    assert cell.mean("map") == pytest.approx(0.6)
    assert cell.error("map") == pytest.approx(0.5 / np.sqrt(2))
    assert cell.seed_error("map") == pytest.approx(0.1)
    better = Cell("b", {"map": cell.values["map"] + 0.1})
    assert better.minus(cell, "map").mean == pytest.approx(0.1)
    assert "is better than" in sentence("b", "a", {"mean": 0.1, "low": 0.1, "high": 0.1, "p_value": 0.0}, "map")


def test_a_reduction_keeps_inner_products_better_than_cutting_and_exactly_at_full_width() -> None:
    rng = np.random.default_rng(0)
    spread = np.diag(1.0 / (1 + rng.permutation(12)))
    queries = (rng.normal(size=(400, 12)) @ spread).astype(np.float32)
    items = (rng.normal(size=(500, 12)) @ spread).astype(np.float32)
    exact = queries @ items.T

    def error(width: int) -> float:
        left, right = reduction(queries, items, width)
        return float(np.square((queries @ left) @ (items @ right).T - exact).mean())

    assert error(12) < 1e-6 * float(np.square(exact).mean())
    assert error(4) < float(np.square(queries[:, :4] @ items[:, :4].T - exact).mean())
    assert error(2) > error(4) > error(8)


def test_codes_order_nearly_as_the_vectors_do_and_take_less() -> None:
    rng = np.random.default_rng(0)
    items, queries = (rng.normal(size=(n, 16)).astype(np.float32) for n in (100, 3))
    exact, sizes = queries @ items.T, []
    for name in STORAGES:
        index = stored(name, items)
        assert np.corrcoef(full_scores(index, queries).ravel(), exact.ravel())[0, 1] > 0.98
        sizes.append(index.sa_code_size())
    assert np.allclose(full_scores(stored("float32", items), queries), exact, atol=1e-5)
    assert sizes == [64, 16, 8]


def test_calls_are_timed_in_turn() -> None:
    order: list[str] = []
    found = interleaved({n: lambda turn, n=n: order.append(n) for n in "ab"}, rounds=2, warm=1)
    assert order == ["a", "b"] * 3 and found["a"]["p99"] >= found["a"]["p50"] >= 0


def test_only_what_stands_between_the_markers_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "p.md"
    assert not put_block(page, "x", "new")
    page.write_text("a\n<!-- study:x -->\nold\n<!-- /study:x -->\nb\n")
    assert put_block(page, "x", "new") and put_block(page, "x", "newer")
    assert page.read_text() == "a\n<!-- study:x -->\nnewer\n<!-- /study:x -->\nb\n"
    with pytest.raises(InvalidRequest, match="study:y"):
        put_block(page, "y", "new")


def test_the_noise_halves_are_those_of_the_rankings() -> None:
    from byline.evaluation import study_data
    from byline.rankings import labelled

    assert (study_data.LEARN, study_data.JUDGE) == (labelled.LEARN, labelled.JUDGE)
