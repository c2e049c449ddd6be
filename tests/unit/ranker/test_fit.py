"""Fitting: learns what raw features cannot know, the same under one seed, never worse than its start."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from byline.errors import LabelsNotUsable
from byline.evaluation.baselines import global_mean_rank_scores, raw_feature_scores
from byline.evaluation.map import mean_average_precision
from byline.ranker.fit import FitConfig, fit_head
from byline.ranker.head import HeadConfig
from byline.ranker.labelled_set import LabelledSet

FIT = FitConfig(max_steps=80, queries_per_step=24, items_per_step=200, evaluate_every=20, evaluate_at=20)


def _config(planted) -> HeadConfig:
    return HeadConfig(planted.train.in_dim, planted.blocks, hidden=(64,), out_dim=64)


@pytest.mark.parametrize(("loss", "margin"), [("listwise", 0.15), ("bce_rank", 0.1)])
def test_a_head_learns_a_planted_ranking_better_than_raw_features_and_no_image(make_planted, loss, margin):
    planted = make_planted()
    report = fit_head(planted.train, planted.validation, _config(planted), replace(FIT, loss=loss), seed=0)
    held_out = planted.validation
    raw = mean_average_precision(raw_feature_scores(held_out.query_features, held_out.item_features), held_out.tau, 20)
    blind = mean_average_precision(global_mean_rank_scores(planted.train, held_out.queries), held_out.tau, 20)
    assert report.best_map > raw.mean + margin
    assert report.best_map > blind.mean + margin
    assert report.slope > 0


def test_a_fit_repeats_under_its_seed_whatever_the_encode_batch_and_the_global_stream(make_planted):
    planted = make_planted()
    fit = replace(FIT, max_steps=30)
    first = fit_head(planted.train, planted.validation, _config(planted), fit, seed=5)
    torch.rand(17)
    second = fit_head(planted.train, planted.validation, _config(planted), replace(fit, encode_batch=13), seed=5)
    other = fit_head(planted.train, planted.validation, _config(planted), fit, seed=6)
    for name, tensor in first.head.state_dict().items():
        assert torch.equal(tensor, second.head.state_dict()[name]), name
    assert [p.step for p in first.history] == [p.step for p in second.history]
    np.testing.assert_allclose([p.validation_map for p in first.history], [p.validation_map for p in second.history],
                               atol=1e-3)
    assert any(not torch.equal(t, other.head.state_dict()[n]) for n, t in first.head.state_dict().items())


def test_a_fit_leaves_the_callers_random_stream_alone(make_planted):
    planted = make_planted()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    fit_head(planted.train, planted.validation, _config(planted), replace(FIT, max_steps=3), seed=5)
    assert torch.equal(torch.rand(3), expected)


def test_labels_without_information_return_the_start(make_planted):
    planted = make_planted(queries=10, held_out=24)
    rng = np.random.default_rng(0)
    noise = replace(planted.train, tau=rng.normal(size=planted.train.tau.shape).astype(np.float32))
    report = fit_head(noise, planted.validation, _config(planted), FIT, seed=0)
    assert len(report.history) > 2, "it was tried"
    assert report.best_step == 0 and report.best_map == report.start_map == report.history[0].validation_map
    start = fit_head(noise, planted.validation, _config(planted), replace(FIT, max_steps=0), seed=0)
    for name, tensor in start.head.state_dict().items():
        assert torch.equal(tensor, report.head.state_dict()[name]), name


def test_a_warm_start_continues_where_the_other_head_stopped(make_planted):
    planted = make_planted()
    first = fit_head(planted.train, planted.validation, _config(planted), FIT, seed=0)
    second = fit_head(planted.train, planted.validation, _config(planted), replace(FIT, max_steps=10), seed=1,
                      warm_start=first.head)
    assert abs(second.start_map - first.best_map) < 1e-3
    assert second.best_map >= second.start_map


def test_few_candidates_per_query_are_enough_to_learn(make_planted):
    planted = make_planted()
    tau = planted.train.tau.copy()
    rng = np.random.default_rng(0)
    for row in tau:
        row[rng.choice(tau.shape[1], tau.shape[1] // 2, replace=False)] = np.nan
    report = fit_head(replace(planted.train, tau=tau), planted.validation, _config(planted), FIT, seed=0)
    assert report.best_map > report.start_map + 0.1


def test_progress_runs_to_its_end(make_planted):
    planted = make_planted()
    seen: list[tuple[int, int]] = []
    fit_head(planted.train, planted.validation, _config(planted), replace(FIT, max_steps=5), seed=0,
             progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (5, 5) and [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_nothing_to_judge_by_is_said(make_planted):
    planted = make_planted()
    nothing = LabelledSet(planted.validation.query_features[:0], planted.validation.item_ids,
                          planted.validation.item_features, planted.validation.tau[:0])
    with pytest.raises(LabelsNotUsable):
        fit_head(planted.train, nothing, _config(planted), FIT, seed=0)


@pytest.mark.parametrize("loss", ["listwise", "bce_rank"])
def test_a_weighted_fit_does_not_learn_from_labels_that_are_known_to_be_noise(make_planted, loss):
    planted, rng = make_planted(), np.random.default_rng(3)
    spread = float(planted.train.tau.std())
    wrong = rng.random(planted.train.tau.shape) < 0.6
    noisy = np.where(wrong, rng.normal(scale=4 * spread, size=wrong.shape), planted.train.tau).astype(np.float32)
    error = np.where(wrong, 4 * spread, 0.1 * spread).astype(np.float32)
    train = replace(planted.train, tau=noisy, standard_error=error)
    fit = replace(FIT, loss=loss)
    plain, weighted = (fit_head(train, planted.validation, _config(planted), each, seed=0)
                       for each in (fit, replace(fit, weighted=True)))
    assert weighted.best_map > plain.best_map + 0.03


def test_equal_errors_weigh_nothing_and_none_at_all_are_refused(make_planted):
    planted = make_planted()
    same = replace(planted.train, standard_error=np.full_like(planted.train.tau, 0.1))
    fit = replace(FIT, max_steps=20)
    plain = fit_head(planted.train, planted.validation, _config(planted), fit, seed=1)
    weighted = fit_head(same, planted.validation, _config(planted), replace(fit, weighted=True), seed=1)
    assert weighted.best_map == pytest.approx(plain.best_map, abs=2e-3)
    with pytest.raises(LabelsNotUsable, match="standard errors"):
        fit_head(planted.train, planted.validation, _config(planted), replace(fit, weighted=True), seed=1)
