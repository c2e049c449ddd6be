from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from byline.errors import JobCancelled, TeacherNotUsable
from byline.teachers import TeacherItem
from byline.teachers.abu_plus import AbuPlus
from byline.teachers.first_order import AbuPlusLinear


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])


@pytest.fixture(scope="module")
def exact(bench) -> AbuPlus:
    return AbuPlus(bench.model, bench.curvature, bench.settings)


@pytest.fixture(scope="module")
def ranking(bench, exact):
    return exact.score(bench.query, bench.items)


def test_unlearning_the_query_raises_its_own_loss(bench, exact) -> None:
    """The sign of everything: an ascent step on the query must hurt the query itself."""
    direction = exact.direction(bench.query)
    step = exact.calibrate(direction, bench.query)
    twin = TeacherItem(0, bench.query.image, bench.query.prompt)
    assert exact.rise(direction, step, [twin]).mean() > 0


def test_tau_is_linear_and_odd_in_the_step(bench, exact) -> None:
    direction = exact.direction(bench.query)
    step = exact.calibrate(direction, bench.query) / 10
    up, down, twice = (exact.rise(direction, f * step, bench.items).mean(1) for f in (1, -1, 2))
    assert np.linalg.norm(up + down) < 0.05 * np.linalg.norm(up)
    assert np.linalg.norm(twice - 2 * up) < 0.05 * np.linalg.norm(twice)


def test_tau_does_not_depend_on_batch_size_or_candidate_order(bench, exact, ranking) -> None:
    small = AbuPlus(bench.model, bench.curvature, bench.settings, batch=5)
    backwards = small.score(bench.query, bench.items[::-1])
    assert np.allclose(backwards.tau[::-1], ranking.tau, rtol=0.02, atol=0.02 * np.abs(ranking.tau).max())
    assert np.array_equal(backwards.item_ids[::-1], ranking.item_ids)


def test_a_candidate_subset_gets_the_scores_of_the_whole(bench, exact, ranking) -> None:
    direction = exact.direction(bench.query)
    step = exact.calibrate(direction, bench.query)
    whole, part = (exact.rise(direction, step, items) for items in (bench.items, bench.items[5:9]))
    assert np.allclose(whole[5:9], part)


def test_first_order_agrees_with_the_exact_form(bench, ranking) -> None:
    linear = AbuPlusLinear(bench.model, bench.curvature, bench.settings).score(bench.query, bench.items)
    assert spearman(linear.tau, ranking.tau) > 0.99
    slope = np.polyfit(linear.tau, ranking.tau, 1)[0]
    assert 0.9 < slope < 1.1


def test_first_order_scores_many_queries_as_it_scores_one(bench) -> None:
    linear = AbuPlusLinear(bench.model, bench.curvature, replace(bench.settings, noise="shared"), batch=13)
    other = replace(bench.query, prompt="a blue dog")
    both = linear.score_many([bench.query, other], bench.items)
    alone = linear.score(other, bench.items)
    assert np.allclose(both[1].tau, alone.tau, rtol=1e-3, atol=1e-4 * np.abs(alone.tau).max())


def test_a_killed_first_order_run_resumes_to_the_same_scores(bench, tmp_path: Path) -> None:
    linear = AbuPlusLinear(bench.model, bench.curvature, bench.settings)
    directions = {n: g[None] for n, g in linear.direction(bench.query).items()}
    whole = linear.replicates(directions, bench.items, chunk=5)
    seen = 0

    def kill() -> None:
        nonlocal seen
        seen += 1
        if seen == 3:
            raise JobCancelled("killed by the test")

    with pytest.raises(JobCancelled):
        linear.replicates(directions, bench.items, check=kill, chunk=5, store=tmp_path / "scores.npy")
    seen = 10
    resumed = linear.replicates(directions, bench.items, check=kill, chunk=5, store=tmp_path / "scores.npy")
    assert seen == 10 + 3, "the two finished chunks were not computed again"
    assert np.array_equal(resumed, whole)


def test_the_standard_error_is_that_of_the_replicates(bench, ranking) -> None:
    """Scores from other noise scatter around these with about the stated error."""
    other = AbuPlus(bench.model, bench.curvature, replace(bench.settings, seed=1))
    direction = AbuPlus(bench.model, bench.curvature, bench.settings).direction(bench.query)
    step = 1e-3
    per_draw = other.rise(direction, step, bench.items) / (24 * step)
    again = per_draw.mean(1)
    pooled = np.sqrt(ranking.standard_error**2 * 2)
    assert 0.3 < np.median(np.abs(again - ranking.tau) / pooled) < 2.0


def test_cancellation_is_seen_between_items(bench, exact) -> None:
    calls = []

    def check() -> None:
        calls.append(1)
        if len(calls) > 3:
            raise JobCancelled("stop")

    with pytest.raises(JobCancelled):
        exact.score(bench.query, bench.items, check=check)
    assert len(calls) == 4


def test_a_step_lost_in_rounding_is_refused(bench) -> None:
    settings = replace(bench.settings, corpus_size=10**12)
    with pytest.raises(TeacherNotUsable, match="rounding"):
        AbuPlus(bench.model, bench.curvature, settings).score(bench.query, bench.items)


def test_baselines_are_measured_once(bench, exact, ranking) -> None:
    before = len(exact._baselines)
    exact.score(replace(bench.query, prompt="a blue dog"), bench.items)
    assert len(exact._baselines) == before


def test_the_teacher_id_changes_with_settings(bench, exact) -> None:
    other = AbuPlus(bench.model, bench.curvature, replace(bench.settings, damping=0.2))
    assert other.teacher_id != exact.teacher_id
