"""Vectors as encoders give them: a few directions carry most of the variance, in overlapping groups."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest


@dataclass(frozen=True)
class Corpus:
    ids: np.ndarray
    vectors: np.ndarray
    queries: np.ndarray


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    rng = np.random.default_rng(5)
    count, dim = 9_000, 32
    spread = (1.0 + np.arange(dim)) ** -0.5
    centres = rng.standard_normal((60, dim)) * spread
    vectors = centres[rng.integers(0, 60, count)] + 0.8 * rng.standard_normal((count, dim)) * spread
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = vectors[rng.integers(0, count, 24)] + 0.05 * rng.standard_normal((24, dim))
    ids = rng.permutation(10**12 // 10**6)[:count].astype(np.int64) * 10**12 + 7  # 64 bits are needed
    return Corpus(ids, vectors.astype(np.float32), queries.astype(np.float32))
