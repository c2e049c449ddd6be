"""An estimate orders the whole corpus by the sketches' inner products, and knows its own noise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from byline.index import FlatIndex
from byline.teachers.token_gradients import TokenBasis, TokenGradients
from services.workers import estimation
from services.workers.estimation import best_by_tokens, best_estimates, shortlisted

RNG = np.random.default_rng(0)
IDS = RNG.permutation(10_000)[:300].astype(np.int64)
ITEMS = (1e-3 * RNG.standard_normal((300, 12))).astype(np.float32)
SKETCH = (RNG.standard_normal(12) + 0.3 * RNG.standard_normal((8, 12))).astype(np.float32)
CORPUS = 350
NOBODY = np.empty(0, dtype=np.int64)


@pytest.fixture(scope="module")
def index() -> FlatIndex:
    return FlatIndex.build(IDS, ITEMS)


def expected(exclude: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, tau and standard errors of everything kept, best first, item by item."""
    keep = ~np.isin(IDS, exclude)
    tau = SKETCH.astype(np.float64) @ ITEMS[keep].astype(np.float64).T / CORPUS
    order = np.argsort(-tau.mean(0))
    return IDS[keep][order], tau.mean(0)[order], (tau.std(0, ddof=1) / np.sqrt(8))[order]


def test_tau_and_its_error_are_those_of_the_replicates(index: FlatIndex) -> None:
    ids, tau, error = expected(NOBODY)
    found = best_estimates(SKETCH, index, CORPUS, 20, NOBODY)
    assert [one.item_id for one in found] == ids[:20].tolist()
    np.testing.assert_allclose([one.tau for one in found], tau[:20], rtol=1e-9)
    np.testing.assert_allclose([one.standard_error for one in found], error[:20], rtol=1e-9)


def test_withdrawn_items_are_left_out_before_the_best_are_chosen(index: FlatIndex) -> None:
    gone = expected(NOBODY)[0][:7]
    found = best_estimates(SKETCH, index, CORPUS, 20, gone)
    assert [one.item_id for one in found] == expected(gone)[0][:20].tolist()
    assert len(best_estimates(SKETCH, index, CORPUS, 400, gone)) == 293


def test_one_replicate_has_no_error_and_equal_items_are_ordered_by_id() -> None:
    twins = FlatIndex.build(np.array([9, 3, 6]), np.ones((3, 2), dtype=np.float32))
    found = best_estimates(np.ones((1, 2), dtype=np.float32), twins, 2, 3, NOBODY)
    assert [one.item_id for one in found] == [3, 6, 9]
    assert all(np.isnan(one.standard_error) for one in found)


def token_gradients(count: int = 40) -> TokenGradients:
    rng = np.random.default_rng(2)
    maps = torch.from_numpy(rng.standard_normal((6, 6)).astype(np.float32))
    deltas = torch.from_numpy(rng.standard_normal((count, 3, 6)).astype(np.float32))
    captions = [f"caption {n % 7}" for n in range(count)]
    texts = torch.from_numpy(rng.standard_normal((7, 3, 5)).astype(np.float32))
    ids = np.arange(100, 100 + count)[::-1].copy()


    def encode_prompts(asked: list[str]) -> torch.Tensor:
        return texts[[int(caption[-1]) for caption in asked]]

    return TokenGradients.encode(TokenBasis(("one",), maps, maps), ids, deltas, captions, encode_prompts)


def test_token_gradients_give_the_best_allowed_items_and_the_replicates_error() -> None:
    tokens = token_gradients()
    directions = np.random.default_rng(3).standard_normal((4, 6, 5)).astype(np.float32)
    tau = tokens.scores(directions).astype(np.float64) / CORPUS  # [replicates, n]
    allowed = np.ones(40, dtype=bool)
    allowed[np.argsort(-tau.mean(0))[:3]] = False
    found = best_by_tokens(directions, tokens, allowed, CORPUS, 5)
    order = [n for n in np.argsort(-tau.mean(0)) if allowed[n]][:5]
    assert [one.item_id for one in found] == tokens.item_ids[order].tolist()
    np.testing.assert_allclose([one.tau for one in found], tau.mean(0)[order], rtol=1e-4)
    np.testing.assert_allclose([one.standard_error for one in found], tau.std(0, ddof=1)[order] / 2, rtol=1e-3)


def flood(best_first: np.ndarray, copies: int) -> Callable[[np.ndarray], np.ndarray]:
    """Groups in which the best ``copies`` items are one picture, and every other item is a group of its own."""
    return lambda ids: np.where(np.isin(ids, best_first[:copies]), -1, ids)


def test_copies_of_the_best_item_take_one_of_the_places_and_the_search_goes_on_behind_them(index: FlatIndex) -> None:
    best = expected(NOBODY)[0]
    found = best_estimates(SKETCH, index, CORPUS, 5, NOBODY, flood(best, 40))
    assert [one.item_id for one in found] == best[:44].tolist(), "forty copies, and four other groups"


def test_a_group_larger_than_anybody_would_list_is_cut(index: FlatIndex) -> None:
    best = expected(NOBODY)[0]
    found = best_estimates(SKETCH, index, CORPUS, 2, NOBODY, flood(best, 200))
    assert [one.item_id for one in found] == best[:64].tolist()


def test_by_token_gradients_copies_take_one_place_too() -> None:
    tokens = token_gradients()
    directions = np.random.default_rng(3).standard_normal((4, 6, 5)).astype(np.float32)
    best = tokens.item_ids[np.argsort(-tokens.scores(directions).mean(0))]
    found = best_by_tokens(directions, tokens, np.ones(40, dtype=bool), CORPUS, 5, flood(best, 30))
    assert [one.item_id for one in found] == best[:34].tolist()


def test_of_a_large_corpus_only_what_the_sketches_put_first_is_scanned(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = token_gradients()
    vectors = np.random.default_rng(4).standard_normal((40, 12)).astype(np.float32)
    index = FlatIndex.build(tokens.item_ids, vectors)
    gone = tokens.item_ids[:2]
    assert shortlisted(SKETCH, index, tokens, gone).sum() == 38, "a small corpus is scanned whole"
    monkeypatch.setattr(estimation, "SCANNED", 10)
    chosen = shortlisted(SKETCH, index, tokens, gone)
    best = index.search(SKETCH.mean(0)[None], 10, gone)[1][0]
    assert set(tokens.item_ids[chosen].tolist()) == set(best.tolist())
