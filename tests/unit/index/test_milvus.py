"""The client code of a Milvus cluster, run for real against milvus-lite."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from byline.errors import ReleaseCorrupt
from byline.index import FlatIndex, choose_index, load_index
from byline.index.milvus import MilvusIndex

pytest.importorskip("pymilvus", reason="the extra milvus is not installed (pip install 'byline[milvus]')")
pytest.importorskip("milvus_lite", reason="the extra milvus is not installed (pip install 'byline[milvus]')")

COUNT = 600


@pytest.fixture(scope="module")
def vectors(corpus) -> np.ndarray:
    rows = corpus.vectors[:COUNT].copy()
    rows[100:130] = rows[100]
    return rows


@pytest.fixture(scope="module")
def flat(corpus, vectors) -> FlatIndex:
    return FlatIndex.build(corpus.ids[:COUNT], vectors)


@pytest.fixture(scope="module")
def index(corpus, vectors, tmp_path_factory):
    place = tmp_path_factory.mktemp("milvus") / "lite.db"
    made = MilvusIndex.build(corpus.ids[:COUNT], vectors, uri=str(place), index_type="FLAT")
    yield made
    made.close()


@pytest.mark.parametrize("removed", [0, 20, 300, 594])
def test_milvus_answers_as_exact_search_does(index, flat, corpus, vectors, removed: int) -> None:
    exclude = np.random.default_rng(3).permutation(corpus.ids[:COUNT])[:removed]
    queries = np.concatenate([corpus.queries[:2], vectors[100:101]])
    for ours, theirs in zip(index.search(queries, 10, exclude), flat.search(queries, 10, exclude), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_vectors_come_back_by_id(index, corpus, vectors) -> None:
    np.testing.assert_array_equal(index.vectors(corpus.ids[[7, 3, 500]]), vectors[[7, 3, 500]])
    with pytest.raises(KeyError, match=str(corpus.ids[COUNT])):
        index.vectors(corpus.ids[COUNT : COUNT + 1])


def test_what_is_saved_names_the_collection_and_opens_it_again(index, flat, corpus, tmp_path: Path) -> None:
    index.save(tmp_path / "index")
    again = load_index(tmp_path / "index", "Milvus")
    assert (again.ntotal, again.dim, again.factory) == (COUNT, 32, "Milvus")
    np.testing.assert_array_equal(again.ids, flat.ids)
    np.testing.assert_array_equal(again.search(corpus.queries[:2], 5)[1], flat.search(corpus.queries[:2], 5)[1])


def test_an_equal_index_takes_the_collection_that_is_there_and_fills_one_that_is_not_whole(
    index, corpus, vectors
) -> None:
    first = MilvusIndex.build(corpus.ids[:COUNT], vectors, uri=index._uri)
    filled: list[int] = []
    original = MilvusIndex._fill

    class Counting(MilvusIndex):
        def _fill(self, vectors: np.ndarray) -> None:
            filled.append(len(vectors))
            original(self, vectors)

    assert Counting.build(corpus.ids[:COUNT], vectors, uri=index._uri)._collection == first._collection
    assert filled == []
    first._client.delete(first._collection, ids=corpus.ids[:5].tolist())
    first._client.flush(first._collection)
    Counting.build(corpus.ids[:COUNT], vectors, uri=index._uri)
    other = Counting.build(corpus.ids[:COUNT], -vectors, uri=index._uri)
    assert filled == [COUNT, COUNT] and other._collection != first._collection


def test_a_forced_engine_is_chosen_and_its_recall_told(index, corpus, vectors) -> None:
    choice = choose_index(corpus.ids[:COUNT], vectors, queries=corpus.queries, factory=f"Milvus:{index._uri}")
    assert (choice.factory, choice.forced, choice.queries) == ("Milvus", True, 24) and choice.recall >= 0.99


def test_a_collection_that_is_not_whole_is_refused(index, flat, tmp_path: Path) -> None:
    stranger = MilvusIndex(index._uri, "absent", flat.ids, 32)
    stranger.save(tmp_path / "index")
    with pytest.raises(ReleaseCorrupt, match="holds 0 items"):
        MilvusIndex.load(tmp_path / "index")
    (tmp_path / "broken").write_bytes(b"nothing")
    with pytest.raises(ReleaseCorrupt):
        MilvusIndex.load(tmp_path / "broken")
