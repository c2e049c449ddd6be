"""The direct part: what needs no labels is kept whole, beside what is learnt, at every width."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from byline.errors import FeatureMismatch
from byline.evaluation.map import mean_average_precision
from byline.evaluation.recall import recall_at
from byline.ranker.direct import DirectPart
from byline.ranker.fit import FitConfig, choose_blend, fit_head, held_out_map
from byline.ranker.head import HeadConfig, load_head, nested_columns, save_head
from byline.ranker.labelled_set import LabelledSet

NAMES, DIMS = ("minilm", "gradient"), (10, 24)


def world(seed: int = 0, noise: float = 0.3) -> tuple[LabelledSet, LabelledSet]:
    """Influence is the inner product of long item vectors; the other block knows a little of it."""
    rng = np.random.default_rng(seed)
    size = np.geomspace(3, 0.3, 24)
    items, queries = rng.normal(size=(200, 24)) * size, rng.normal(size=(60, 24)) * size
    mix = rng.normal(size=(24, 10))
    tau = queries @ items.T

    def rows(vectors: np.ndarray) -> np.ndarray:
        noisy = vectors + noise * rng.normal(size=vectors.shape)
        return np.concatenate([np.tanh(vectors @ mix) + noise * rng.normal(size=(len(vectors), 10)), noisy], axis=1)

    item_rows, query_rows = rows(items).astype(np.float32), rows(queries).astype(np.float32)
    ids = np.arange(200)

    def part(place: slice) -> LabelledSet:
        return LabelledSet(query_rows[place], ids, item_rows, tau[place].astype(np.float32))

    return part(slice(0, 40)), part(slice(40, 60))


def config(width: int = 0, names=NAMES, dims=DIMS) -> HeadConfig:
    return HeadConfig.of_encoders(names, dims, (16,), 12, width)


FIT = FitConfig(max_steps=30, evaluate_every=10, evaluate_at=10, items_per_step=128)


def test_a_head_of_the_direct_block_alone_needs_no_steps_and_keeps_its_order() -> None:
    train, validation = world(noise=0.0)
    first, second = (
        LabelledSet(s.query_features[:, 10:], s.item_ids, s.item_features[:, 10:], s.tau) for s in (train, validation)
    )
    report = fit_head(first, second, config(names=NAMES[1:], dims=DIMS[1:]), FIT, seed=0)
    assert report.best_map > 0.95 and report.best_step == 0 and report.head.config.embedding_dim == 24
    assert report.head.direct is not None
    scores = report.head.scores(second.query_features, second.item_features)
    assert np.corrcoef(scores[0], second.tau[0])[0, 1] > 0.99


def test_the_blend_is_at_least_as_good_as_either_part_on_validation() -> None:
    train, validation = world(noise=1.0)
    report = fit_head(train, validation, config(), FIT, seed=0)
    head = report.head
    q, i = validation.query_features, validation.item_features
    assert report.best_map == pytest.approx(held_out_map(head, validation, FIT), abs=2e-3)
    for part in (head.direct_scores(q, i), head.learned_scores(q, i)):
        assert report.best_map >= mean_average_precision(part, validation.tau, 10).mean - 2e-3
    blended = head.direct_scores(q, i) + float(head.blend) * head.learned_scores(q, i)
    np.testing.assert_allclose(head.scores(q, i), blended, rtol=1e-3, atol=1e-4)


def test_a_length_that_is_mostly_noise_is_tempered_and_the_first_item_comes_first_more_often() -> None:
    """mAP hardly moves when a few long items crowd the first places; of choices alike in it the best top-1 wins."""

    def long(labelled: LabelledSet) -> LabelledSet:
        stretched = labelled.item_features.copy()
        stretched[:, 10:] *= np.exp(0.5 * np.random.default_rng(5).normal(size=(200, 1))).astype(np.float32)
        return LabelledSet(labelled.query_features, labelled.item_ids, stretched, labelled.tau)

    train, validation = map(long, world(noise=0.1))
    head = fit_head(train, validation, config(), FIT, seed=0).head
    assert head.direct is not None and float(head.direct.temper) > 0
    scores = head.scores(validation.query_features, validation.item_features)
    tempered = float(np.nanmean(recall_at(scores, validation.tau, 1, 1)))
    head.set_powers(float(head.direct.exponent), 0.0, train.item_features, train.query_features)
    plain = head.scores(validation.query_features, validation.item_features)
    assert tempered >= float(np.nanmean(recall_at(plain, validation.tau, 1, 1)))


def test_a_power_of_one_is_the_cosine_and_none_the_inner_product() -> None:
    part, (train, _) = DirectPart(24), world()
    items, queries = (torch.from_numpy(rows[:, 10:]) for rows in (train.item_features, train.query_features))
    part.initialise(items, queries)
    assert torch.equal(part.items(items), items)
    part.set_powers(0.0, 1.0, items, queries)
    lengths = part.items(items).norm(dim=1)
    torch.testing.assert_close(lengths, items.norm(dim=1).median().expand(200))
    assert (torch.cosine_similarity(part.items(items), items) > 0.9999).all()  # no item changes its direction or sign


def test_ordering_the_columns_changes_no_score_and_puts_the_largest_first() -> None:
    train, validation = world()
    head = fit_head(train, validation, config(names=NAMES, dims=DIMS), FIT, seed=0).head
    vectors = head.embed_items(train.item_features)[:, 24:-1]  # the network's, without direct columns and prior
    energy = (vectors**2).mean(0)
    assert (np.diff(energy) <= 1e-5).all()
    before = head.scores(validation.query_features, validation.item_features)
    head.order_columns(train.item_features)
    np.testing.assert_allclose(head.scores(validation.query_features, validation.item_features), before,
                               rtol=1e-3, atol=1e-4)  # fmt: skip


def test_a_narrow_head_is_columns_of_the_full_one() -> None:
    train, validation = world()
    full = fit_head(train, validation, config(), FIT, seed=0).head
    narrow = full.narrowed(20)
    assert narrow.config.embedding_dim == 20 and full.config.embedding_dim == 24 + 12 + 1
    kept = nested_columns(full.config, 20)
    whole = full.embed_items(train.item_features)
    np.testing.assert_array_equal(narrow.embed_items(train.item_features), whole[:, kept])
    assert kept.tolist() == [*range(10), *range(24, 33), 36]
    assert full.narrowed(37).config == full.config
    with pytest.raises(FeatureMismatch, match="narrowed"):
        full.narrowed(38)


def test_every_width_has_distinct_columns_and_as_many_as_it_says() -> None:
    whole = config()
    for width in range(1, whole.full_dim + 1):
        kept = nested_columns(whole, width)
        assert len(set(kept.tolist())) == width and kept.max() < whole.full_dim


def test_a_width_in_the_config_is_what_is_served_and_survives_saving(tmp_path) -> None:
    train, validation = world()
    report = fit_head(train, validation, config(width=20), FIT, seed=0)
    save_head(report.head, tmp_path / "head.safetensors")
    again = load_head(tmp_path / "head.safetensors")
    assert again.config == report.head.config and again.config.embedding_dim == 20
    np.testing.assert_array_equal(
        again.embed_queries(train.query_features), report.head.embed_queries(train.query_features)
    )
    assert report.best_map == pytest.approx(choose_blend(again, train, validation, FIT))


def test_a_warm_start_may_be_of_another_width() -> None:
    train, validation = world()
    first = fit_head(train, validation, config(width=20), FIT, seed=0)
    again = fit_head(train, validation, config(), FIT, seed=1, warm_start=first.head)
    assert again.history[0].validation_map == pytest.approx(first.history[-1].validation_map, abs=0.05)


def test_scores_do_not_change_sign_with_the_blend() -> None:
    """Higher stays more influential whatever weight the network has."""
    train, validation = world()
    head = fit_head(train, validation, config(), FIT, seed=0).head
    for blend in (0.0, 1.0, 100.0):
        head.blend.fill_(blend)
        scores = head.scores(train.query_features, train.item_features)
        assert np.mean([np.corrcoef(s, t)[0, 1] for s, t in zip(scores, train.tau, strict=True)]) > 0.1
    assert torch.is_tensor(head.blend)


def test_a_direct_block_that_is_not_there_is_refused() -> None:
    with pytest.raises(FeatureMismatch, match="direct block"):
        HeadConfig(34, config().blocks, direct="unheard_of")
