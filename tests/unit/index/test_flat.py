"""Exact search stays exact: under filters, ties, any batch, and from a mapped file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from byline.errors import FeatureMismatch, ReleaseCorrupt
from byline.index import FlatIndex, build_index, load_index

RNG = np.random.default_rng(0)
IDS = RNG.permutation(10**6)[:3000].astype(np.int64)
VECTORS = RNG.standard_normal((3000, 24)).astype(np.float32)
QUERIES = RNG.standard_normal((40, 24)).astype(np.float32)


def brute_force(query: np.ndarray, k: int, exclude: np.ndarray | None = None) -> np.ndarray:
    keep = np.ones(len(IDS), dtype=bool) if exclude is None else ~np.isin(IDS, exclude)
    scores = VECTORS[keep].astype(np.float64) @ query.astype(np.float64)
    return IDS[keep][np.lexsort((IDS[keep], -scores))][:k]


@pytest.fixture(scope="module")
def index() -> FlatIndex:
    return FlatIndex.build(IDS, VECTORS)


def test_excluding_99_percent_of_the_items_keeps_exact_recall(index: FlatIndex) -> None:
    exclude = IDS[RNG.permutation(3000)[:2970]]
    _, ids = index.search(QUERIES, 20, exclude)
    for query, found in zip(QUERIES, ids, strict=True):
        np.testing.assert_array_equal(found, brute_force(query, 20, exclude))


def test_an_excluded_item_never_comes_back_and_unknown_ids_do_no_harm(index: FlatIndex) -> None:
    best = index.search(QUERIES[:1], 5)[1][0]
    again = index.search(QUERIES[:1], 5, np.array([best[0], 2**62, 0, best[0]], dtype=np.int64))[1][0]
    np.testing.assert_array_equal(again[:4], best[1:])


def test_rows_are_padded_when_fewer_than_k_items_remain(index: FlatIndex) -> None:
    scores, ids = index.search(QUERIES[:1], 10, IDS[4:])
    assert set(ids[0, :4]) == set(IDS[:4])
    assert (ids[0, 4:] == -1).all()
    assert np.isneginf(scores[0, 4:]).all()
    assert (index.search(QUERIES[:1], 3, IDS)[1] == -1).all()


def test_an_answer_does_not_depend_on_the_batch(index: FlatIndex) -> None:
    scores, ids = index.search(QUERIES, 50)
    for row in (0, 15, 16, 39):
        alone = index.search(QUERIES[row : row + 1], 50)
        np.testing.assert_array_equal(alone[0][0], scores[row])
        np.testing.assert_array_equal(alone[1][0], ids[row])


def test_ties_are_ordered_by_id_even_across_the_last_place() -> None:
    same = np.ones((500, 8), dtype=np.float32)
    ids = RNG.permutation(10**6)[:500].astype(np.int64)
    found = FlatIndex.build(ids, same).search(same[:1], 7)[1][0]
    np.testing.assert_array_equal(found, np.sort(ids)[:7])


@pytest.mark.parametrize("mmap", [True, False])
def test_a_saved_index_answers_the_same(index: FlatIndex, tmp_path: Path, mmap: bool) -> None:
    index.save(tmp_path / "embeddings.faiss")
    again = load_index(tmp_path / "embeddings.faiss", mmap=mmap)
    assert (again.ntotal, again.dim, again.factory) == (3000, 24, "Flat")
    np.testing.assert_array_equal(again.ids, np.sort(IDS))
    for ours, theirs in zip(again.search(QUERIES, 30, IDS[:9]), index.search(QUERIES, 30, IDS[:9]), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_broken_or_foreign_file_is_refused(index: FlatIndex, tmp_path: Path) -> None:
    import faiss

    path = tmp_path / "embeddings.faiss"
    index.save(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ReleaseCorrupt):
        load_index(path)
    with pytest.raises(ReleaseCorrupt):
        load_index(tmp_path / "absent.faiss")
    faiss.write_index(faiss.IndexFlatIP(4), str(path))
    with pytest.raises(ReleaseCorrupt):
        load_index(path)
    with pytest.raises(ReleaseCorrupt):
        load_index(path, factory="IVF9,Flat")


def test_vectors_that_do_not_fit_are_refused(index: FlatIndex) -> None:
    with pytest.raises(FeatureMismatch):
        index.search(QUERIES[:, :8], 5)
    with pytest.raises(FeatureMismatch):
        index.search(np.full((1, 24), np.nan, dtype=np.float32), 5)
    with pytest.raises(ValueError, match="distinct"):
        build_index(np.array([1, 1], dtype=np.int64), VECTORS[:2])
    with pytest.raises(ValueError, match="finite"):
        build_index(IDS[:1], np.full((1, 4), np.inf, dtype=np.float32))


@pytest.mark.parametrize("mmap", [True, False])
def test_vectors_come_back_by_id_as_they_were_given(index: FlatIndex, tmp_path: Path, mmap: bool) -> None:
    index.save(tmp_path / "index")
    again = FlatIndex.load(tmp_path / "index", mmap)
    rows = RNG.permutation(3000)[:50]
    np.testing.assert_array_equal(again.vectors(IDS[rows]), VECTORS[rows])
    assert again.vectors(IDS[:0]).shape == (0, 24)
    for unknown in (int(IDS.max()) + 1, -5):
        with pytest.raises(KeyError, match=str(unknown)):
            again.vectors(np.array([IDS[0], unknown]))


def test_a_filter_is_remembered_only_where_it_cannot_change_unseen(index: FlatIndex) -> None:
    query = np.ones((1, index.dim), dtype=np.float32)
    first = index.search(query, 3)[1][0]
    removed = first[:1].copy()
    assert first[0] not in index.search(query, 3, removed)[1]
    removed[0] = first[1]
    after = index.search(query, 3, removed)[1]
    assert first[0] in after and first[1] not in after
    fixed, other = first[:1].copy(), first[1:2].copy()
    for array in (fixed, other):
        array.setflags(write=False)
    for array in (fixed, other, fixed, fixed):
        found = index.search(query, 3, array)[1]
        assert array[0] not in found and len(np.intersect1d(found, first)) == 2
