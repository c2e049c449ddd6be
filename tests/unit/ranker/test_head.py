"""The head: residual start, sign, saving, shapes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from byline.errors import FeatureMismatch, ReleaseCorrupt
from byline.ranker.head import FeatureBlock, Head, HeadConfig, load_head, save_head


def _config(planted, **changes) -> HeadConfig:
    base = HeadConfig(planted.train.in_dim, planted.blocks, hidden=(32,), out_dim=64)
    return replace(base, **changes)


def _started(planted, **changes) -> Head:
    head = Head(_config(planted, **changes))
    head.initialise(planted.train.item_features, planted.train.query_features, torch.Generator().manual_seed(3))
    return head


def test_a_residual_head_starts_as_the_order_of_raw_cosines(make_planted):
    planted = make_planted()
    head = _started(planted)
    train = planted.train
    mean, deviation = train.item_features.mean(0), train.item_features.std(0)
    expected = np.zeros((train.queries, train.items))
    start = 0
    for block in planted.blocks:
        columns = slice(start, start + block.dim)
        items = ((train.item_features - mean) / deviation)[:, columns]
        queries = ((train.query_features - train.query_features.mean(0)) / deviation)[:, columns]
        items = items / np.linalg.norm(items, axis=1, keepdims=True)
        queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
        expected += queries @ items.T / len(planted.blocks)
        start += block.dim
    scores = head.scores(train.query_features, train.item_features)
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_a_narrow_residual_head_starts_close_to_the_raw_cosines(make_planted):
    planted = make_planted()
    train = planted.train
    exact = _started(planted).scores(train.query_features, train.item_features)
    narrow = _started(planted, out_dim=24).scores(train.query_features, train.item_features)
    assert np.corrcoef(exact.ravel(), narrow.ravel())[0, 1] > 0.9


def test_an_item_is_its_own_nearest_when_mean_and_prior_are_shared(make_planted):
    planted = make_planted()
    for residual in (True, False):
        head = _started(planted, own_query_mean=False, item_prior=False, residual=residual)
        scores = head.scores(planted.train.item_features[:40], planted.train.item_features)
        assert (scores.argmax(1) == np.arange(40)).all()
        np.testing.assert_allclose(scores[np.arange(40), np.arange(40)], 1.0, atol=1e-5)


def test_the_item_prior_adds_the_same_to_every_query(make_planted):
    planted = make_planted()
    head = _started(planted)
    before = head.scores(planted.train.query_features, planted.train.item_features)
    with torch.no_grad():
        head.prior.weight.normal_(generator=torch.Generator().manual_seed(1))
    gained = head.scores(planted.train.query_features, planted.train.item_features) - before
    assert gained.std(axis=0).max() < 1e-5
    assert gained.std(axis=1).min() > 0.01
    assert head.embed_items(planted.train.item_features).shape[1] == head.config.embedding_dim == 65


def test_saving_and_loading_changes_nothing(make_planted, tmp_path: Path):
    planted = make_planted()
    head = _started(planted)
    save_head(head, tmp_path / "head.safetensors")
    again = load_head(tmp_path / "head.safetensors")
    assert again.config == head.config
    np.testing.assert_array_equal(again.embed_items(planted.train.item_features),
                                  head.embed_items(planted.train.item_features))


def test_a_file_that_is_no_head_is_refused(tmp_path: Path):
    path = tmp_path / "head.safetensors"
    with pytest.raises(ReleaseCorrupt):
        load_head(path)
    path.write_bytes(b"not a head")
    with pytest.raises(ReleaseCorrupt):
        load_head(path)


def test_embedding_does_not_depend_on_the_batch_and_leaves_the_input_alone(make_planted):
    planted = make_planted()
    head = _started(planted)
    features = planted.train.item_features.copy()
    features.setflags(write=False)
    np.testing.assert_allclose(head.embed_items(features, batch=7), head.embed_items(features, batch=1000), atol=1e-6)


def test_a_constant_dimension_changes_nothing(make_planted):
    planted = make_planted()
    constant = np.full((planted.train.items, 1), 5.0, dtype=np.float32)
    items = np.concatenate([planted.train.item_features, constant], axis=1)
    queries = np.concatenate([planted.train.query_features, constant[: planted.train.queries] + 1], axis=1)
    blocks = (planted.blocks[0], FeatureBlock("text", planted.blocks[1].dim + 1))
    head = Head(HeadConfig(items.shape[1], blocks, hidden=(8,), out_dim=80))
    head.initialise(items, queries, torch.Generator().manual_seed(0))
    plain = _started(planted, out_dim=80)
    np.testing.assert_allclose(head.scores(queries, items),
                               plain.scores(planted.train.query_features, planted.train.item_features), atol=1e-5)


def test_features_of_another_width_are_refused(make_planted):
    planted = make_planted()
    with pytest.raises(FeatureMismatch):
        _started(planted).embed_queries(np.zeros((2, 3), dtype=np.float32))
    with pytest.raises(FeatureMismatch):
        HeadConfig(10, (FeatureBlock("image", 9),))
