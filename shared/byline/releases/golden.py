"""Golden queries: a few feature rows with the answers the release gave when it was built.

Why it exists: digests prove that files are whole, not that they belong together or that this machine
computes the same. A release that does not reproduce its own answers is never served.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from byline.errors import ReleaseCorrupt

#: Answers recorded per query.
TOP_K = 10
#: Scores may differ this much between machines (another BLAS, another vector width).
TOLERANCE = 1e-3

Search = Callable[[NDArray[np.float32], int], tuple[NDArray[np.float32], NDArray[np.int64]]]


@dataclass(frozen=True, slots=True)
class GoldenQueries:
    """Query features [g, d_in] and what the release answered: scores [g, k] and ids [g, k]."""

    features: NDArray[np.float32]
    scores: NDArray[np.float32]
    ids: NDArray[np.int64]

    @classmethod
    def record(cls, features: NDArray[np.float32], search: Search, items: int) -> GoldenQueries:
        """Ask the queries of ``search(features, k)`` and keep the answers."""
        features = np.ascontiguousarray(features, dtype=np.float32)
        scores, ids = search(features, min(TOP_K, items))
        return cls(features, scores, ids)

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        save_file({"features": self.features, "scores": self.scores, "ids": self.ids}, path)

    @classmethod
    def load(cls, path: Path) -> GoldenQueries:
        """Read a file written by ``save``. ReleaseCorrupt when it is broken or holds no query."""
        try:
            tensors = load_file(path)
            golden = cls(tensors["features"], tensors["scores"], tensors["ids"])
        except (OSError, SafetensorError, KeyError) as error:
            raise ReleaseCorrupt(f"{path.name} cannot be read as golden queries", file=path.name) from error
        if golden.features.ndim != 2 or not len(golden.features) or golden.scores.shape != golden.ids.shape:
            raise ReleaseCorrupt(f"{path.name} holds no usable golden query", file=path.name)
        return golden

    def check(self, search: Search, exact: bool = True) -> None:
        """Ask again. ReleaseCorrupt when an answer differs by more than rounding can explain.

        Where the k-th and the next score are equal within the tolerance, either item may come back. An index that is
        not ``exact`` may miss one item of a query, because another machine's rounding sends it into another list;
        what it does find must have the recorded score.
        """
        scores, ids = search(self.features, self.ids.shape[1])
        for n in range(len(self.ids)):
            if not self._same(n, scores[n], ids[n]) and (exact or not self._nearly(n, scores[n], ids[n])):
                raise ReleaseCorrupt(
                    f"golden query {n} is answered differently than when the release was built: its head and its "
                    "index do not belong together, or this machine computes wrongly",
                    query=n,
                )

    def _same(self, n: int, scores: NDArray[np.float32], ids: NDArray[np.int64]) -> bool:
        recorded = self.scores[n]
        gone = ~np.isin(self.ids[n], ids)
        explained = recorded[gone] <= recorded[-1] + TOLERANCE * (1 + abs(recorded[-1]))
        return bool(np.allclose(scores, recorded, rtol=TOLERANCE, atol=TOLERANCE) and explained.all())

    def _nearly(self, n: int, scores: NDArray[np.float32], ids: NDArray[np.int64]) -> bool:
        _, then, now = np.intersect1d(self.ids[n], ids, return_indices=True)
        same = np.allclose(scores[now], self.scores[n][then], rtol=TOLERANCE, atol=TOLERANCE)
        return same and len(then) >= len(ids) - 1 and len(then) > 0
