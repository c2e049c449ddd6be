"""Every approximate tier: exact scores, filters that cost no recall, ties, batches, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from byline.errors import FeatureMismatch, ReleaseCorrupt
from byline.index import FlatIndex, VectorIndex, build_index, load_index
from byline.index import refined as refined_module
from byline.index import tiers as tiers_module
from byline.index.refined import RefinedIndex
from byline.index.tiers import default_lists

TIERS = ["SQ8,RFlat", "IVF32,SQ8,RFlat", "RR32,IVF32,RaBitQ,RFlat", "HNSW16,Flat"]
K = 50


@pytest.fixture(scope="module")
def flat(corpus) -> FlatIndex:
    return FlatIndex.build(corpus.ids, corpus.vectors)


@pytest.fixture(scope="module", params=TIERS)
def tier(request, corpus) -> VectorIndex:
    index = build_index(corpus.ids, corpus.vectors, request.param)
    if "IVF" in request.param:
        index.with_effort({"nprobe": 10} | ({"k_factor": 16} if "RaBitQ" in request.param else {}))
    return index


@pytest.fixture(autouse=True)
def small_exact_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a filter that leaves some dozens of items still goes through the tier."""
    monkeypatch.setattr(refined_module, "EXACT_ROWS", 50)


def recall(found: np.ndarray, true: np.ndarray) -> float:
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, true, strict=True)]))


def test_what_is_found_has_exact_scores_in_order_and_nearly_everything_is_found(tier, flat, corpus) -> None:
    scores, ids = tier.search(corpus.queries, K)
    true_scores, true_ids = flat.search(corpus.queries, K)
    assert recall(ids, true_ids) >= 0.98
    known = {(row, item): s for row in range(24) for item, s in zip(true_ids[row], true_scores[row], strict=True)}
    for row in range(24):
        assert (np.diff(scores[row]) <= 0).all()
        for item, score in zip(ids[row], scores[row], strict=True):
            assert known.get((row, item), score) == score  # to the bit


def removed_sets(corpus, flat) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shuffled = rng.permutation(corpus.ids)
    near = flat.search(corpus.queries[:1], 6_000)[1][0]
    return {"1 %": shuffled[:90], "30 %": shuffled[:2_700], "90 %": shuffled[:8_100], "99 %": shuffled[:8_910],
            "around a query": near, "every third around a query": near[::3]}  # fmt: skip


#: Answers asked for where not so many items are left: for more, a scan of all of them is cheaper than any tier.
FEWER = {"90 %": 10, "99 %": 3, "around a query": 40}


@pytest.mark.parametrize("case", ["1 %", "30 %", "90 %", "99 %", "around a query", "every third around a query"])
def test_a_filter_before_top_k_costs_no_recall(tier, flat, corpus, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exclude, k = removed_sets(corpus, flat)[case], FEWER.get(case, K)
    asked: list[int] = []
    candidates = type(tier)._candidates

    def noted(self: RefinedIndex, queries: np.ndarray, *arguments: Any) -> Any:
        asked.append(len(queries))
        return candidates(self, queries, *arguments)

    monkeypatch.setattr(type(tier), "_candidates", noted)
    if case == "99 %":
        monkeypatch.setattr(tier, "k_factor", min(tier.k_factor, 2.0))
    _, ids = tier.search(corpus.queries, k, exclude)
    assert sum(asked) >= len(corpus.queries), "an exhaustive scan says nothing of the tier"
    _, true = flat.search(corpus.queries, k, exclude)
    assert not np.isin(ids, exclude).any()
    assert (ids != -1).all()
    assert recall(ids, true) >= 0.98


def test_rows_are_padded_when_fewer_than_k_items_remain(tier, corpus) -> None:
    scores, ids = tier.search(corpus.queries[:2], 10, corpus.ids[4:])
    assert set(ids[0, :4]) == set(corpus.ids[:4]) and (ids[:, 4:] == -1).all() and np.isneginf(scores[:, 4:]).all()
    assert (tier.search(corpus.queries[:1], 3, corpus.ids)[1] == -1).all()


@pytest.mark.parametrize("filtered", [False, True])
def test_an_answer_does_not_depend_on_the_batch(tier, corpus, filtered: bool) -> None:
    exclude = corpus.ids[::3] if filtered else None
    scores, ids = tier.search(corpus.queries, K, exclude)
    for row in (0, 15, 16, 23):
        alone = tier.search(corpus.queries[row : row + 1], K, exclude)
        np.testing.assert_array_equal(alone[0][0], scores[row])
        np.testing.assert_array_equal(alone[1][0], ids[row])


def test_a_large_k_is_answered_in_full(tier, flat, corpus) -> None:
    for k in (700, 5_000):
        _, ids = tier.search(corpus.queries[:3], k)
        assert (ids != -1).all() and recall(ids, flat.search(corpus.queries[:3], k)[1]) >= 0.98


@pytest.mark.parametrize("factory", TIERS)
def test_twins_are_ordered_by_id_and_the_smallest_ids_win_the_last_places(corpus, factory: str) -> None:
    vectors = corpus.vectors.copy()
    twins = np.arange(100, 130)
    vectors[twins] = vectors[100]
    index = build_index(corpus.ids, vectors, factory)
    found = index.search(vectors[100:101], 20)[1][0]
    np.testing.assert_array_equal(found, np.sort(corpus.ids[twins])[:20])


@pytest.mark.parametrize("mmap", [True, False])
def test_a_saved_index_answers_the_same(tier, corpus, tmp_path: Path, mmap: bool) -> None:
    tier.save(tmp_path / "index.faiss")
    again = load_index(tmp_path / "index.faiss", tier.factory, mmap)
    assert (again.ntotal, again.dim, again.factory) == (9_000, 32, tier.factory)
    assert again.effort == tier.effort
    assert again.stats.build_seconds is None and tier.stats.build_seconds > 0
    for exclude in (None, corpus.ids[::3]):
        for ours, theirs in zip(
            again.search(corpus.queries, 30, exclude), tier.search(corpus.queries, 30, exclude), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(again.vectors(corpus.ids[5:9]), corpus.vectors[5:9])


def test_bytes_per_item_are_those_of_the_file(tier, tmp_path: Path) -> None:
    tier.save(tmp_path / "index.faiss")
    stored = (tmp_path / "index.faiss").stat().st_size / tier.ntotal
    vectors = 0 if "HNSW" in tier.factory else 4 * tier.dim
    assert tier.stats.stored_bytes_per_item == pytest.approx(stored, rel=0.05)
    assert tier.stats.bytes_per_item == pytest.approx(stored - vectors, rel=0.05)


def test_the_same_vectors_make_the_same_index_in_any_order(corpus) -> None:
    order = np.random.default_rng(0).permutation(len(corpus.ids))
    for factory in TIERS[:3]:
        one = build_index(corpus.ids, corpus.vectors, factory).search(corpus.queries, 20)
        two = build_index(corpus.ids[order], corpus.vectors[order], factory).search(corpus.queries, 20)
        np.testing.assert_array_equal(one[1], two[1])


def test_another_kind_of_file_and_another_width_are_refused(tier, corpus, tmp_path: Path) -> None:
    with pytest.raises(FeatureMismatch):
        tier.search(corpus.queries[:, :8], 5)
    tier.save(tmp_path / "index.faiss")
    for factory in {*TIERS, "IVF64,SQ8,RFlat", "Flat", "IVF9,Flat"} - {tier.factory}:
        with pytest.raises(ReleaseCorrupt):
            load_index(tmp_path / "index.faiss", factory)
    faiss.write_index(faiss.IndexFlatIP(4), str(tmp_path / "bare"))
    with pytest.raises(ReleaseCorrupt):
        load_index(tmp_path / "bare", tier.factory)


def test_an_unknown_factory_is_refused(corpus) -> None:
    for factory in ("PQ8", "Milvus"):
        with pytest.raises(ValueError, match="Milvus"):
            build_index(corpus.ids, corpus.vectors, factory)


def test_lists_grow_with_the_root_of_the_corpus() -> None:
    assert [default_lists(n) for n in (1, 10_000, 100_000, 1_000_000)] == [16, 256, 512, 2048]


@pytest.mark.parametrize("factory", TIERS)
def test_rows_added_some_at_a_time_give_the_same_answers(corpus, factory: str, monkeypatch) -> None:
    whole = build_index(corpus.ids, corpus.vectors, factory)
    monkeypatch.setattr(refined_module, "_ADDED_AT_ONCE", 2_000)
    parts = build_index(corpus.ids, corpus.vectors, factory)
    assert parts.ntotal == whole.ntotal
    _, one = whole.search(corpus.queries, K)
    _, two = parts.search(corpus.queries, K)
    assert recall(one, two) >= (0.95 if "HNSW" in factory else 1.0)  # a graph depends on the order of its links


def test_a_large_corpus_is_trained_on_as_many_rows_as_are_of_use(corpus, flat, monkeypatch) -> None:
    monkeypatch.setattr(tiers_module, "_LEAST_TRAINING_ROWS", 1_000)
    monkeypatch.setattr(tiers_module, "_POINTS_PER_LIST", 10)
    rows = tiers_module.IVFRaBitQIndex._training_rows(corpus.vectors)
    assert len(rows) == 10 * default_lists(9_000) and np.isin(rows[:, 0], corpus.vectors[:, 0]).all()
    index = build_index(corpus.ids, corpus.vectors, "RR32,IVF32,RaBitQ,RFlat")
    index.with_effort({"nprobe": 16, "k_factor": 16})
    assert recall(index.search(corpus.queries, K)[1], flat.search(corpus.queries, K)[1]) >= 0.97


def test_a_remembered_filter_answers_as_one_that_is_new(tier, corpus) -> None:
    first, second = corpus.ids[::3].copy(), corpus.ids[1::3].copy()
    fresh = [tier.search(corpus.queries[:3], K, removed)[1] for removed in (first, second)]
    for removed in (first, second):
        removed.setflags(write=False)
    for number in (0, 1, 1, 0, 0):
        np.testing.assert_array_equal(tier.search(corpus.queries[:3], K, (first, second)[number])[1], fresh[number])
