"""The linear datamodeling score on data whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from byline.errors import LabelsNotUsable
from byline.evaluation.lds import judge_lds, predictions, score_lds

RNG = np.random.default_rng(0)
TAU = RNG.standard_normal((12, 60))
KEPT = np.stack([RNG.permutation(60) < 30 for _ in range(24)])
#: A world that is a linear datamodel: what is kept lowers the loss by its tau.
LOSSES = 5.0 - KEPT.astype(float) @ TAU.T


def test_the_true_datamodel_scores_one_and_its_negative_minus_one() -> None:
    assert score_lds(predictions(TAU, KEPT), LOSSES).mean == pytest.approx(1.0)
    assert score_lds(predictions(-TAU, KEPT), LOSSES).mean == pytest.approx(-1.0)


def test_shuffled_scores_predict_nothing_within_their_error() -> None:
    shuffled = np.stack([row[RNG.permutation(60)] for row in TAU])
    score = score_lds(predictions(shuffled, KEPT), LOSSES)
    assert abs(score.mean) < 3 * score.error
    assert score.error < 0.15


def test_noise_in_the_losses_lowers_the_score_and_pooled_agrees() -> None:
    noisy = LOSSES + 5 * RNG.standard_normal(LOSSES.shape)
    score = score_lds(predictions(TAU, KEPT), noisy)
    assert 0.3 < score.mean < 0.9
    assert score.pooled == pytest.approx(score.mean, abs=0.1)


def test_a_prediction_of_one_value_scores_zero() -> None:
    assert score_lds(np.ones((24, 12)), LOSSES).mean == 0.0


def test_the_scale_of_a_query_does_not_matter_to_either_figure() -> None:
    scale = np.linspace(0.1, 100, 12)
    score, scaled = (score_lds(predictions(TAU, KEPT) * s, LOSSES) for s in (1.0, scale))
    assert scaled.mean == score.mean
    assert scaled.pooled == pytest.approx(score.pooled)


def test_spearman_agrees_with_a_plain_computation_where_there_are_ties() -> None:
    predicted = np.round(predictions(TAU, KEPT))
    expected = []
    for q in range(12):
        ranks = [np.array([np.mean(np.flatnonzero(np.sort(v) == x)) for x in v]) for v in
                 (predicted[:, q], -LOSSES[:, q])]
        expected.append(np.corrcoef(ranks[0], ranks[1])[0, 1])
    np.testing.assert_allclose(score_lds(predicted, LOSSES).per_query, expected, atol=1e-12)


def test_a_better_teacher_is_ahead_by_more_than_the_error() -> None:
    noisy = TAU + 2 * RNG.standard_normal(TAU.shape)
    judged = judge_lds({"true": predictions(TAU, KEPT), "noisy": predictions(noisy, KEPT),
                        "same": predictions(TAU, KEPT)}, LOSSES, reference="true")
    lead, same = judged["noisy"].lead, judged["same"].lead
    assert lead is not None and same is not None and judged["true"].lead is None
    assert lead.mean > 2 * lead.error > 0
    assert (same.mean, same.error) == (0.0, 0.0)


def test_judging_together_gives_what_judging_alone_gives() -> None:
    noisy = predictions(TAU + RNG.standard_normal(TAU.shape), KEPT)
    together = judge_lds({"a": predictions(TAU, KEPT), "b": noisy}, LOSSES)["b"]
    alone = score_lds(noisy, LOSSES)
    assert (together.mean, together.error_subsets, together.error) == (alone.mean, alone.error_subsets, alone.error)


def test_too_few_retrainings_are_refused() -> None:
    with pytest.raises(LabelsNotUsable, match="at least 3"):
        score_lds(np.zeros((2, 4)), np.zeros((2, 4)))
