"""Which items a query is ranked over, and where they came from."""

from __future__ import annotations

import numpy as np

from services.curation.shortlist import Shortlist, choose_shortlist

IDS = np.arange(1000, 1500)


def _features() -> tuple[np.ndarray, np.ndarray]:
    features = np.random.default_rng(0).standard_normal((500, 8)).astype(np.float32)
    return features[42] + 0.01, features


def _ids(found: np.ndarray) -> set[int]:
    return set(found.tolist())


def test_candidates_are_the_nearest_and_a_random_share_from_outside_them() -> None:
    query, features = _features()
    chosen = choose_shortlist(query, IDS, features, count=50, explore_share=0.2, seed=1)
    nearest = choose_shortlist(query, IDS, features, count=40, explore_share=0.0, seed=1)
    assert len(_ids(chosen.item_ids)) == 50 and chosen.outside == 460
    assert 1042 in nearest.item_ids and _ids(nearest.item_ids) == _ids(chosen.nearest)
    assert _ids(chosen.item_ids) - _ids(chosen.nearest) == _ids(chosen.explored)
    other = choose_shortlist(query, IDS, features, count=50, explore_share=0.2, seed=2)
    assert _ids(other.explored) != _ids(chosen.explored)
    shuffled = np.random.default_rng(3).permutation(500)
    again = choose_shortlist(query, IDS[shuffled], features[shuffled], count=40, explore_share=0.0, seed=1)
    assert np.array_equal(again.item_ids, nearest.item_ids)


def test_the_head_has_as_long_a_list_as_the_raw_features_and_both_count() -> None:
    query, features = _features()
    scores = -np.abs(np.arange(500) - 300).astype(np.float32)  # items around 1300
    chosen = choose_shortlist(query, IDS, features, count=50, explore_share=0.2, seed=1, head_scores=scores,
                              release_id="r1")  # fmt: skip
    raw = choose_shortlist(query, IDS, features, count=20, explore_share=0.0, seed=1).item_ids
    assert _ids(raw) <= _ids(chosen.nearest) and {1299, 1300, 1301} <= _ids(chosen.by_head)
    assert abs(len(chosen.nearest) - len(chosen.by_head)) <= 1
    assert len(_ids(chosen.nearest) | _ids(chosen.by_head)) == 40 and len(chosen.explored) == 10
    assert not _ids(chosen.explored) & (_ids(chosen.nearest) | _ids(chosen.by_head))
    assert chosen.release_id == "r1"


def test_a_small_corpus_is_ranked_whole() -> None:
    query, features = _features()
    chosen = choose_shortlist(query, IDS, features, count=500, explore_share=0.2, seed=1)
    assert len(chosen.item_ids) == 500 and chosen.outside == 0 and len(chosen.explored) == 0


def test_influence_estimates_decide_by_themselves_where_there_are_such() -> None:
    _, features = _features()
    query = np.zeros(8, np.float32)
    query[3] = 1.0
    chosen = choose_shortlist(query, IDS, features, count=10, explore_share=0.0, seed=0, direct=slice(2, 5))
    assert _ids(chosen.item_ids) == _ids(IDS[np.argsort(-features[:, 3])[:10]])


def test_a_bare_list_is_a_shortlist_too() -> None:
    assert Shortlist(IDS).outside == 0
