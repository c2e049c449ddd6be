"""The feature store: keyed by id, resumable after any kill, closed to features of another spec."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from byline.errors import FeatureMismatch
from byline.features import FeatureExtractor, FeatureSpec, FeatureStore, fill_store

SPEC = FeatureSpec(("minilm",), (4,), ("a" * 16,))


class CountingEncoder:
    """Writes the text's number into its feature; counts rows."""

    name = "minilm"
    dim = 4
    modality = "text"
    preprocessing_hash = "a" * 16

    def __init__(self) -> None:
        self.rows = 0

    def encode(self, images: object, texts: list[str]) -> np.ndarray:
        self.rows += len(texts)
        return np.array([[float(text)] * 4 for text in texts], dtype=np.float32)


def features_of(ids: list[int]) -> np.ndarray:
    return np.repeat(np.array(ids, dtype=np.float32)[:, None], 4, axis=1)


def pair_of(item_id: int) -> tuple[Image.Image, str]:
    return Image.new("RGB", (2, 2)), str(item_id)


def test_rows_come_back_by_id_across_shards_and_reopening(tmp_path: Path) -> None:
    ids = [5, 3, 9, 2**60, 1, 7, 8]
    store = FeatureStore(tmp_path, SPEC, "c", rows_per_shard=3)
    assert store.append(ids[:2], features_of(ids[:2])) == 2
    assert store.append(ids, features_of(ids)) == 5
    again = FeatureStore(tmp_path, SPEC, "c")
    assert again.ids.tolist() == ids
    np.testing.assert_array_equal(again.matrix(), features_of(ids))
    np.testing.assert_array_equal(again.matrix([9, 5, 9]), features_of([9, 5, 9]))
    assert again.missing([4, 9, 6]) == [4, 6]
    with pytest.raises(FeatureMismatch):
        again.matrix([4])


@pytest.mark.parametrize(
    ("spec", "corpus"),
    [
        (FeatureSpec(("minilm",), (4,), ("b" * 16,)), "c"),
        (FeatureSpec(("minilm",), (5,), ("a" * 16,)), "c"),
        (FeatureSpec(("clip_text",), (4,), ("a" * 16,)), "c"),
        (SPEC, "another"),
    ],
)
def test_features_of_another_spec_or_corpus_are_refused(tmp_path: Path, spec: FeatureSpec, corpus: str) -> None:
    FeatureStore(tmp_path, SPEC, "c").append([1], features_of([1]))
    with pytest.raises(FeatureMismatch):
        FeatureStore(tmp_path, spec, corpus)


def test_unusable_rows_are_refused(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, SPEC, "c")
    for ids, rows in (([1], np.zeros((1, 3))), ([1, 1], np.zeros((2, 4))), ([1], np.full((1, 4), np.nan))):
        with pytest.raises(FeatureMismatch):
            store.append(ids, rows.astype(np.float32))
    assert len(store) == 0
    assert store.matrix().shape == (0, 4)


KILLED_IN_MID_SHARD = """
import os, signal, sys
import numpy as np
from pathlib import Path
from byline.features import store as module
from byline.features import FeatureSpec, FeatureStore

flushes, limit = [0], int(sys.argv[2])
real = module._flush
def flush(array):
    flushes[0] += 1
    if flushes[0] == limit:
        os.kill(os.getpid(), signal.SIGKILL)
    real(array)
module._flush = flush
store = FeatureStore(Path(sys.argv[1]), FeatureSpec(("minilm",), (4,), ("a" * 16,)), "c", rows_per_shard=4)
for start in range(0, 9, 3):
    ids = list(range(start + 1, start + 4))
    store.append(ids, np.array([[float(i)] * 4 for i in ids], dtype=np.float32))
"""


@pytest.mark.parametrize("limit", [1, 3, 5])
def test_a_run_killed_in_mid_shard_continues_and_no_row_is_half(tmp_path: Path, limit: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED_IN_MID_SHARD, str(tmp_path), str(limit)], env=dict(os.environ), timeout=120
    )
    assert done.returncode == -signal.SIGKILL
    store = FeatureStore(tmp_path, SPEC, "c")
    kept = store.ids.tolist()
    np.testing.assert_array_equal(store.matrix(kept), features_of(kept))
    encoder = CountingEncoder()
    extractor = FeatureExtractor(FeatureSpec.parse("minilm"), [encoder])  # type: ignore[list-item]
    assert fill_store(store, extractor, list(range(1, 10)), pair_of) == 9 - len(kept)
    assert encoder.rows == 9 - len(kept)
    assert sorted(store.ids.tolist()) == list(range(1, 10))
    np.testing.assert_array_equal(store.matrix(range(1, 10)), features_of(list(range(1, 10))))


def test_filling_again_extracts_nothing_and_reports_progress(tmp_path: Path) -> None:
    encoder = CountingEncoder()
    extractor = FeatureExtractor(FeatureSpec.parse("minilm"), [encoder])  # type: ignore[list-item]
    store = FeatureStore(tmp_path, extractor.spec, "c")
    seen: list[tuple[int, int]] = []
    assert fill_store(store, extractor, [1, 2, 3], pair_of, lambda *at: seen.append(at), batch=2) == 3
    assert fill_store(store, extractor, [3, 2, 1, 4], pair_of, lambda *at: seen.append(at), batch=2) == 1
    assert seen == [(2, 3), (3, 3), (4, 4)]
    assert encoder.rows == 4
    other = FeatureStore(tmp_path / "other", FeatureSpec(("minilm",), (4,), ("b" * 16,)), "c")
    with pytest.raises(FeatureMismatch):
        fill_store(other, extractor, [1], pair_of)


def test_two_writers_write_every_row_once(tmp_path: Path) -> None:
    stores = [FeatureStore(tmp_path, SPEC, "c", rows_per_shard=5) for _ in range(3)]
    ids = list(range(1, 41))

    def write(store: FeatureStore) -> None:
        for start in range(0, 40, 4):
            store.append(ids[start : start + 4], features_of(ids[start : start + 4]))

    threads = [threading.Thread(target=write, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    fresh = FeatureStore(tmp_path, SPEC, "c")
    assert sorted(fresh.ids.tolist()) == ids
    np.testing.assert_array_equal(fresh.matrix(ids), features_of(ids))


def test_a_damaged_store_is_refused(tmp_path: Path) -> None:
    FeatureStore(tmp_path, SPEC, "c").append([1], features_of([1]))
    shard = tmp_path / "shard-00000" / "features.npy"
    shard.write_bytes(shard.read_bytes()[:200])
    with pytest.raises(FeatureMismatch):
        FeatureStore(tmp_path, SPEC, "c")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(FeatureMismatch):
        FeatureStore(tmp_path, SPEC, "c")


def test_two_that_want_the_same_corpus_encode_it_once_between_them(tmp_path: Path) -> None:
    encoders = [CountingEncoder(), CountingEncoder()]
    start = threading.Barrier(2)

    def fill(encoder: CountingEncoder) -> None:
        store = FeatureStore(tmp_path, SPEC, "c")
        start.wait(timeout=10)
        fill_store(store, FeatureExtractor(SPEC, [encoder]), list(range(40)), pair_of, batch=4)

    threads = [threading.Thread(target=fill, args=(encoder,)) for encoder in encoders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sum(encoder.rows for encoder in encoders) == 40
    assert sorted(FeatureStore(tmp_path, SPEC, "c").ids.tolist()) == list(range(40))
