"""What one ranking says of the student, and of the shortlists it was pruned to."""

from __future__ import annotations

import math

import numpy as np
import pytest

from byline.drift.clusters import PROMPTS_EACH, fit_clusters
from byline.drift.measure import agree, calibrated, pruning, top_threshold


def test_agreement_is_one_with_itself_and_lower_for_every_exchange() -> None:
    tau = np.arange(60.0)
    assert agree(tau, tau).overlap == 1.0 and agree(tau, tau).spearman == pytest.approx(1.0)
    assert agree(-tau, tau).overlap == 0.0 and agree(-tau, tau).spearman == pytest.approx(-1.0)
    few = agree(tau[:10], tau[:10])
    assert (few.k, few.overlap) == (5, 1.0)
    assert math.isnan(agree(tau[:1], tau[:1]).overlap)


def _pruned(rng: np.random.Generator, kept: float) -> tuple[list[float], list[float], float, float]:
    """Estimates from samples of one corpus, and the truth: the shortlists hold a ``kept`` share of the top."""
    n, top, sample = 400, 40, 60
    tau = rng.standard_normal(n)
    order = np.argsort(-tau)
    in_top = rng.random(top) < kept
    inside = set(order[:top][in_top].tolist()) | set(order[top : top + 80].tolist())
    outside = np.array([item for item in range(n) if item not in inside])
    threshold_inside = np.sort(tau[sorted(inside)])[-top]
    true_missed = float((tau[outside] > threshold_inside).sum())
    true_lost = 1.0 - in_top.mean()
    lost, missed = [], []
    for _ in range(400):
        explored = rng.choice(outside, size=sample, replace=False)
        ids = np.sort(np.concatenate([sorted(inside), explored]))
        found = pruning(ids, tau[ids], explored, len(outside), top)
        assert found is not None
        lost.append(found.lost)
        missed.append(found.missed)
    return lost, missed, float(true_lost), true_missed


@pytest.mark.parametrize("kept", [1.0, 0.7])
def test_missed_items_and_the_loss_are_estimated_without_bias(kept: float) -> None:
    lost, missed, true_lost, true_missed = _pruned(np.random.default_rng(0), kept)
    for found, true in ((missed, true_missed), (lost, true_lost)):
        assert abs(np.mean(found) - true) <= 4 * np.std(found) / np.sqrt(len(found)) + 1e-9


def test_without_a_look_outside_nothing_is_said_of_pruning() -> None:
    ids, tau = np.arange(10), np.arange(10.0)
    assert pruning(ids, tau, np.zeros(0, np.int64), 5, 3) is None
    assert pruning(ids, tau, np.array([9]), 5, 10) is None  # the top is not inside
    whole = pruning(ids, tau, np.zeros(0, np.int64), 0, 3)
    assert whole is not None and (whole.lost, whole.missed) == (0.0, 0.0)


def test_the_top_begins_at_the_l_th_best_inside_if_enough_is_inside() -> None:
    ids, tau = np.arange(8), np.array([9.0, 8, 7, 6, 5, 4, 3, 2])
    none = np.zeros(0, np.int64)
    assert top_threshold(ids, tau, none, 0, 3) == 7
    assert top_threshold(ids, tau, np.array([0]), 40, 3) == 6
    assert top_threshold(ids, tau, np.array([0]), 40, 4) is None
    assert top_threshold(ids, tau, none, 0, 9) == -math.inf


def test_calibration_compares_what_was_said_with_what_came_true() -> None:
    ids, tau = np.arange(4), np.array([4.0, 3, 2, 1])
    found = calibrated(ids, {0: 0.9, 3: 0.7}, tau, 2.5)
    assert found is not None and (found.predicted, found.observed) == (pytest.approx(0.8), 0.5)
    assert calibrated(ids, {77: 0.9}, tau, 2.5) is None


def test_clusters_find_the_regions_and_name_them_by_a_prompt_of_each() -> None:
    rng = np.random.default_rng(0)
    centres = np.eye(3, 6)
    rows = np.concatenate([centre + 0.05 * rng.standard_normal((PROMPTS_EACH, 6)) for centre in centres])
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    prompts = [f"{'abc'[n // PROMPTS_EACH]}{n}" for n in range(len(rows))]
    clusters = fit_clusters(rows, prompts, "letters", seed=0)
    assert clusters is not None and {example[0] for example in clusters.examples} == set("abc")
    numbers = clusters.of(rows)
    assert [len(set(numbers[n : n + PROMPTS_EACH])) for n in (0, PROMPTS_EACH, 2 * PROMPTS_EACH)] == [1, 1, 1]
    assert fit_clusters(rows[:5], prompts[:5], "letters", seed=0) is None
