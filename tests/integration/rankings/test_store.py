"""Rankings come back bit for bit, once each."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from byline.db import make_engine, transaction
from byline.errors import LabelsNotUsable
from byline.rankings.store import RankingStore


@dataclass(frozen=True, eq=False)
class AnyRanking:
    item_ids: np.ndarray
    tau: np.ndarray
    standard_error: np.ndarray
    tau_halves: np.ndarray | None
    samples: np.ndarray | None
    draws: int = 64
    teacher_id: str = "abu_plus:1"
    candidate_set: str = "corpus"


def a_ranking(n: int = 5) -> AnyRanking:
    rng = np.random.default_rng(3)
    tau = rng.normal(size=n).astype(np.float32)
    return AnyRanking(
        item_ids=rng.permutation(2**40 + np.arange(n)).astype(np.int64),
        tau=tau,
        standard_error=np.abs(tau) / 7,
        tau_halves=np.stack([tau * np.float32(0.9), tau * np.float32(1.1)]),
        samples=(16 * (1 + np.arange(n) % 4)).astype(np.int32),
    )


QUERY = {
    "model_id": "m",
    "prompt": "a cat",
    "seed": 2**40,
    "split": "train",
    "near_duplicate_group": -3,
    "image_sha256": "0" * 64,
    "source": "corpus",
}


@pytest.mark.parametrize("halves", [True, False])  # without halves: nor with samples, as before they were kept
def test_rankings_come_back_bit_for_bit_and_writing_one_twice_changes_nothing(database_url: str, halves: bool):
    engine = make_engine(database_url)
    store = RankingStore(engine)
    ranking = a_ranking() if halves else replace(a_ranking(), tau_halves=None, samples=None)
    with transaction(engine) as connection:
        query_id = store.add_query(connection, **QUERY)
        assert store.add_query(connection, **QUERY) == query_id
        assert store.add_ranking(connection, query_id, ranking) is True
        assert store.add_ranking(connection, query_id, a_ranking(7)) is False
        other = store.add_query(connection, **{**QUERY, "seed": 2, "split": "test"})
        store.add_ranking(connection, other, a_ranking(7))
    (found,) = store.load("m", "abu_plus:1", ["train", "validation"])
    assert (found.query_id, found.prompt, found.split, found.near_duplicate_group) == (query_id, "a cat", "train", -3)
    for name in ("item_ids", "tau", "standard_error"):
        np.testing.assert_array_equal(getattr(found, name), getattr(ranking, name))
        assert getattr(found, name).dtype == getattr(ranking, name).dtype
    if ranking.tau_halves is None:
        assert found.tau_halves is None and found.samples is None
    else:
        np.testing.assert_array_equal(found.samples, ranking.samples)
        assert found.samples.dtype == np.int32
        np.testing.assert_array_equal(found.tau_halves, ranking.tau_halves)
    assert store.counts("m", "abu_plus:1") == {"train": 1, "validation": 0, "test": 1}
    assert store.counts("m", "another") == {"train": 0, "validation": 0, "test": 0}
    assert store.teachers("m") == {"abu_plus:1": 2}
    assert store.query(query_id).seed == 2**40
    # Both were made in one transaction, at one time: their order is that of their ids, and the same each time.
    loaded = [one.query_id for one in store.load("m", "abu_plus:1")]
    assert loaded == sorted([query_id, other]) == [one.query_id for one in store.load("m", "abu_plus:1")]

    bad = [
        replace(ranking, tau=ranking.tau[:-1]),
        replace(ranking, samples=np.ones(4, np.int32)),
        replace(ranking, tau=np.full(5, np.nan, np.float32)),
        replace(ranking, item_ids=np.zeros(5, np.int64)),
        replace(ranking, item_ids=np.zeros(0, np.int64)),
    ]
    for broken in bad:
        with pytest.raises(LabelsNotUsable), transaction(engine) as connection:
            store.add_ranking(connection, query_id, broken)
    engine.dispose()
