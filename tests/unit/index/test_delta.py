"""Merging the answers of an index and of what was added beside it."""

from __future__ import annotations

import numpy as np
import pytest

from byline.index.delta import merge_best
from byline.index.flat import FlatIndex
from byline.index.protocol import NO_ITEM


@pytest.mark.parametrize("split", [1, 7, 19])
def test_two_indexes_merged_answer_as_one_index_of_all_would(split: int):
    rng = np.random.default_rng(split)
    vectors = rng.normal(size=(20, 4)).astype(np.float32)
    vectors[3] = vectors[11]  # a tie across the two
    ids = rng.permutation(np.arange(100, 120)).astype(np.int64)
    queries = rng.normal(size=(5, 4)).astype(np.float32)
    whole = FlatIndex.build(ids, vectors)
    parts = [FlatIndex.build(ids[:split], vectors[:split]), FlatIndex.build(ids[split:], vectors[split:])]
    gone = np.array([101, 107], dtype=np.int64)
    for k in (1, 6, 18, 25):
        merged = merge_best(parts[0].search(queries, k, gone), parts[1].search(queries, k, gone), k)
        expected = whole.search(queries, k, gone)
        np.testing.assert_array_equal(merged[1], expected[1])
        np.testing.assert_allclose(merged[0], expected[0], rtol=1e-6)


def test_fewer_items_than_asked_for_are_padded_last():
    one = FlatIndex.build(np.array([1], np.int64), np.ones((1, 2), np.float32))
    scores, ids = merge_best(one.search(np.ones((1, 2), np.float32), 3), one.search(-np.ones((1, 2), np.float32), 3), 7)
    assert ids.shape == (1, 7)
    assert ids[0, 2:].tolist() == [NO_ITEM] * 5
    assert np.isneginf(scores[0, 2:]).all()
