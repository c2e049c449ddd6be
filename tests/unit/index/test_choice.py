"""The choice: exact while small, otherwise the least work among the tiers whose recall was measured to suffice."""

from __future__ import annotations

import numpy as np
import pytest

from byline.index import FlatIndex, build_index, choose_index
from byline.index import choice as choice_module
from byline.index.choice import efforts, exact_kth, recall_of, work_ms


def test_a_small_corpus_is_searched_exactly(corpus) -> None:
    choice = choose_index(corpus.ids, corpus.vectors)
    assert (choice.factory, choice.recall, choice.forced, choice.queries) == ("Flat", 1.0, False, 0)
    assert choice.index.factory == "Flat" and "MB" in choice.reason


@pytest.fixture(scope="module")
def chosen(corpus):
    return choose_index(corpus.ids, corpus.vectors, queries=corpus.queries, flat_bytes=1)


def test_a_large_one_gets_a_tier_whose_recall_was_measured(corpus, chosen) -> None:
    assert chosen.recall >= 0.99 and chosen.queries == 12
    assert chosen.factory == chosen.index.factory != "Flat"
    true = FlatIndex.build(corpus.ids, corpus.vectors).search(corpus.queries, 100)[1]
    found = chosen.index.search(corpus.queries, 100)[1]
    assert np.mean([len(np.intersect1d(a, b)) / 100 for a, b in zip(found, true, strict=True)]) >= 0.98


def test_what_was_tried_is_told_and_the_least_work_wins(chosen) -> None:
    assert len(chosen.tried) >= 3
    accepted = [trial for trial in chosen.tried if trial.accepted]
    assert all(trial.recall >= 0.99 for trial in accepted)
    best = min(accepted, key=lambda trial: trial.work_ms)
    assert (best.factory, best.effort) == (chosen.factory, chosen.effort)
    assert work_ms(chosen.index) == pytest.approx(best.work_ms, abs=1e-3)


def test_the_choice_is_the_same_again(corpus, chosen) -> None:
    again = choose_index(corpus.ids, corpus.vectors, queries=corpus.queries, flat_bytes=1)
    assert (again.factory, again.tried) == (chosen.factory, chosen.tried)


def test_a_forced_factory_is_taken_and_its_recall_told(corpus) -> None:
    choice = choose_index(corpus.ids, corpus.vectors, factory="SQ8,RFlat")
    assert (choice.factory, choice.forced, choice.reason) == ("SQ8,RFlat", True, "asked for")
    assert 0.9 < choice.recall <= 1 and choice.queries == 64
    with pytest.raises(ValueError, match="unknown"):
        choose_index(corpus.ids, corpus.vectors, factory="PQ9")


def test_exact_search_is_kept_where_no_tier_reaches_the_target(corpus) -> None:
    choice = choose_index(corpus.ids, corpus.vectors, flat_bytes=1, target=1.01, samples=16)
    assert choice.factory == "Flat" and choice.recall == 1.0
    assert len(choice.tried) == 4 and not any(trial.accepted for trial in choice.tried)
    assert "no approximate tier" in choice.reason


def test_recall_counts_an_item_that_ties_with_the_last(corpus) -> None:
    same = np.ones((50, 4), dtype=np.float32)
    index = FlatIndex.build(np.arange(50), same)
    assert recall_of(index, same[:1], 10, exact_kth(index.store, same[:1], 10)) == 1.0
    assert recall_of(index, same[:1], 10, np.array([5.0], dtype=np.float32)) == 0.0


@pytest.fixture(scope="module")
def uneven(corpus) -> np.ndarray:
    """The same directions with norms as sketches have them: the largest hundredth is forty times the smallest."""
    norms = np.exp(1.2 * np.random.default_rng(3).standard_normal(len(corpus.vectors)))
    return (corpus.vectors * norms[:, None]).astype(np.float32)


@pytest.mark.parametrize("factory", ["SQ8,RFlat", "IVF128,SQ8,RFlat", "RR32,IVF128,RaBitQ,RFlat", "HNSW32,Flat"])
def test_norms_that_vary_a_lot_change_the_effort_and_not_the_scores(corpus, uneven, factory: str) -> None:
    choice = choose_index(corpus.ids, uneven, queries=corpus.queries, factory=factory)
    scores, ids = choice.index.search(corpus.queries, 100)
    exact, _ = FlatIndex.build(corpus.ids, uneven).search(corpus.queries, 100)
    np.testing.assert_array_equal(np.sort(scores[0]), np.sort([uneven_score(corpus, uneven, 0, i) for i in ids[0]]))
    assert float((scores >= exact[:, -1:]).mean()) == pytest.approx(choice.recall, abs=0.05)
    assert not choice.tried[0].accepted or choice.recall >= 0.99


def uneven_score(corpus, vectors: np.ndarray, query: int, item: int) -> np.float32:
    one = FlatIndex.build(np.array([item]), vectors[corpus.ids == item])
    return one.search(corpus.queries[query : query + 1], 1)[0][0, 0]


def test_the_choice_reaches_the_target_where_norms_vary_a_lot_on_queries_it_never_saw(corpus, uneven) -> None:
    rng = np.random.default_rng(9)
    noise = 0.05 * rng.standard_normal((200, 32)).astype(np.float32)
    queries = corpus.vectors[rng.integers(0, len(corpus.ids), 200)] + noise
    choice = choose_index(corpus.ids, uneven, queries=queries[:128], flat_bytes=1)
    exact = FlatIndex.build(corpus.ids, uneven)
    assert recall_of(choice.index, queries[128:], 100, exact_kth(exact.store, queries[128:], 100)) >= 0.985


def test_a_recall_that_passes_by_a_hair_is_not_enough(corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice_module, "recalls", lambda index, queries, k, kth: np.linspace(0.981, 1.0, len(queries)))
    refused = choose_index(corpus.ids, corpus.vectors, queries=corpus.queries, factory="SQ8,RFlat")
    assert refused.recall == pytest.approx(0.9905) and not refused.tried[0].accepted


def test_lists_are_looked_at_up_to_half_of_them(corpus) -> None:
    index = build_index(corpus.ids, corpus.vectors, "IVF128,SQ8,RFlat")
    probes = [effort["nprobe"] for effort in efforts(index)]
    assert (probes[0], probes[-1]) == (2, 64) and probes == sorted(probes)
