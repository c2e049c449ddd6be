"""Engines that round differently, here or on a GPU, give the answers of exact search to the bit."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from byline.index import FlatIndex, load_index
from byline.index.accelerated import FaissGpuScan, TorchScan, faiss_gpu_engine, on_device
from byline.index.scan import MatrixScan


class FakeGpu:
    """What faiss-gpu does, in numpy, with float16 products: a rounding far coarser than any GPU's."""

    def __init__(self, rows: np.ndarray, error: float = 0.0) -> None:
        self.rows = rows
        self.error = error
        self.depths: list[int] = []

    def search(self, queries: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
        self.depths.append(depth)
        product = queries @ self.rows.T
        product = product + self.error * np.sin(1e4 * product)
        best = np.argsort(-product, axis=1)[:, :depth]
        return np.take_along_axis(product, best, 1).astype(np.float32), best.astype(np.int64)


ENGINES: dict[str, Callable[[FlatIndex], FlatIndex]] = {
    "matrix": lambda flat: flat.scanned_by(MatrixScan(flat.store.rows)),
    "torch": lambda flat: on_device(flat, "cpu:0"),
    "faiss-gpu": lambda flat: flat.scanned_by(FaissGpuScan(FakeGpu(flat.store.rows))),
    "a coarser one": lambda flat: flat.scanned_by(FaissGpuScan(FakeGpu(flat.store.rows, 1e-6))),
}


@pytest.fixture(scope="module", params=ENGINES)
def pair(request, corpus) -> tuple[FlatIndex, FlatIndex]:
    vectors = corpus.vectors.copy()
    vectors[200:260] = vectors[200]  # sixty twins
    flat = FlatIndex.build(corpus.ids, vectors)
    return FlatIndex(flat._index, flat.ids, scan_from=10**9), ENGINES[request.param](flat)


@pytest.mark.parametrize("k", [1, 20, 300, 8_990])
@pytest.mark.parametrize("removed", [0, 30, 4_500, 8_910])
def test_an_engine_answers_as_exact_search_does_to_the_bit(pair, corpus, k: int, removed: int) -> None:
    exact, engine = pair
    queries = np.concatenate([corpus.queries[:6], corpus.vectors[200:201]])
    exclude = np.random.default_rng(2).permutation(corpus.ids)[:removed]
    for ours, theirs in zip(engine.search(queries, k, exclude), exact.search(queries, k, exclude), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_an_answer_of_a_batch_is_that_of_the_query_alone(pair, corpus) -> None:
    _, engine = pair
    scores, ids = engine.search(corpus.queries, 40)
    for row in (0, 11, 23):
        alone = engine.search(corpus.queries[row : row + 1], 40)
        np.testing.assert_array_equal(alone[0][0], scores[row])
        np.testing.assert_array_equal(alone[1][0], ids[row])


def test_a_matrix_product_in_small_blocks_finds_the_same(corpus) -> None:
    flat = FlatIndex.build(corpus.ids, corpus.vectors)
    scan = MatrixScan(flat.store.rows)
    scan.block, scan.queries = 700, 5
    for ours, theirs in zip(flat.scanned_by(scan).search(corpus.queries, 60), flat.search(corpus.queries, 60),
                            strict=True):  # fmt: skip
        np.testing.assert_array_equal(ours, theirs)


def test_the_gpu_is_asked_for_the_removed_items_too_up_to_its_limit(corpus) -> None:
    flat = FlatIndex.build(corpus.ids, corpus.vectors)
    gpu = FakeGpu(flat.store.rows)
    engine = flat.scanned_by(FaissGpuScan(gpu))
    engine.search(corpus.queries[:1], 10, corpus.ids[:30])
    engine.search(corpus.queries[:1], 10, corpus.ids[:5_000])
    assert gpu.depths == [10 + 32 + 30]  # the second went to the exact store


def test_an_engine_whose_scores_cannot_be_trusted_is_not(corpus) -> None:
    """An error beyond the bound is noticed by the proof only if it is declared: TF32 is."""
    flat = FlatIndex.build(corpus.ids, corpus.vectors)
    scan = FaissGpuScan(FakeGpu(flat.store.rows, 1e-3))
    scan.unit = 2.0**-11
    for ours, theirs in zip(flat.scanned_by(scan).search(corpus.queries, 30), flat.search(corpus.queries, 30),
                            strict=True):  # fmt: skip
        np.testing.assert_array_equal(ours, theirs)


def test_faiss_gpu_is_used_where_it_is_installed_and_sees_a_gpu(corpus) -> None:
    flat = FlatIndex.build(corpus.ids, corpus.vectors)

    class Module:
        StandardGpuResources = SimpleNamespace
        gpus = 1

        @classmethod
        def get_num_gpus(cls) -> int:
            return cls.gpus

        @staticmethod
        def index_cpu_to_gpu(resources: object, device: int, index: object) -> FakeGpu:
            assert index is flat.store.flat and device == 0
            return FakeGpu(flat.store.rows)

    engine = faiss_gpu_engine(flat.store.flat, Module)
    assert engine is not None
    found = flat.scanned_by(FaissGpuScan(engine)).search(corpus.queries, 9)
    np.testing.assert_array_equal(found[1], flat.search(corpus.queries, 9)[1])
    Module.gpus = 0
    assert faiss_gpu_engine(flat.store.flat, Module) is None
    assert faiss_gpu_engine(flat.store.flat, SimpleNamespace()) is None


def test_a_loaded_index_is_scanned_on_the_device_that_is_asked_for(corpus, tmp_path) -> None:
    FlatIndex.build(corpus.ids, corpus.vectors).save(tmp_path / "index")
    there = load_index(tmp_path / "index", device="cpu:0")
    assert isinstance(there._scan, TorchScan)
    here = load_index(tmp_path / "index")
    for ours, theirs in zip(there.search(corpus.queries, 9), here.search(corpus.queries, 9), strict=True):
        np.testing.assert_array_equal(ours, theirs)
