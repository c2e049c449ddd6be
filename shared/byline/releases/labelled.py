"""Where the labelled queries of a release lie, so that an answer can say that its query is far from all of them.

Why it exists: a student knows only what it was shown. Its score for a query of a new kind looks like any other score;
the distance to the nearest labelled query does not. Rows and limit travel with the release that learnt from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from byline.errors import ReleaseCorrupt

FloatArray = npt.NDArray[np.float32]
#: The file in a release; one without it says nothing of distances.
LABELLED = "labelled.safetensors"
#: Rows kept at most, drawn at random: a lookup compares with all of them. Distances are then to the nearest of those.
MOST_ROWS = 2048
#: A query is far if it is farther than this share of labelled queries are from the nearest of another prompt group.
QUANTILE = 0.95
#: Fewer labelled queries say nothing about what is usual.
FEWEST = 20


@dataclass(frozen=True, eq=False)
class LabelledPlaces:
    """``rows`` [l, d] of unit norm, after columns were standardised by ``mean`` and ``deviation`` [d]; ``limit`` is the
    distance beyond which a query is far."""

    rows: FloatArray
    mean: FloatArray
    deviation: FloatArray
    limit: float

    @classmethod
    def of(cls, features: FloatArray, groups: Sequence[int], seed: int) -> LabelledPlaces | None:
        """From features [q, d] of labelled queries and their near-duplicate groups [q]; None for too few of either."""
        names = np.asarray(groups)
        if len(names) > MOST_ROWS:
            kept = np.sort(np.random.default_rng(seed).choice(len(names), size=MOST_ROWS, replace=False))
            features, names = features[kept], names[kept]
        if len(np.unique(names)) < FEWEST:
            return None
        mean, deviation = features.mean(0), features.std(0) + 1e-6
        rows = _unit((features - mean) / deviation)
        apart = _distances(rows, rows)
        apart[names[:, None] == names[None, :]] = np.inf
        return cls(rows, mean.astype(np.float32), deviation.astype(np.float32),
                   float(np.quantile(apart.min(1), QUANTILE)))

    def distance(self, features: FloatArray) -> float:
        """From a query's features [d] to the nearest labelled query: 0 the same direction, 2 the opposite one."""
        row = _unit(((features - self.mean) / self.deviation)[None, :])
        return float(_distances(row, self.rows).min())

    def save(self, path: Path) -> None:
        """Write the file."""
        tensors = {"rows": self.rows, "mean": self.mean, "deviation": self.deviation,
                   "limit": np.array([self.limit], dtype=np.float32)}
        save_file({name: np.ascontiguousarray(value, dtype=np.float32) for name, value in tensors.items()}, path)

    @classmethod
    def load(cls, path: Path, feature_dim: int) -> LabelledPlaces:
        """Read the file. ReleaseCorrupt if it is not one, or of other features."""
        try:
            found = load_file(path)
            rows, mean, deviation, limit = (found[name] for name in ("rows", "mean", "deviation", "limit"))
        except (OSError, KeyError, SafetensorError) as error:
            raise ReleaseCorrupt(f"{path.name} cannot be read: {error!r}", file=path.name) from error
        if rows.ndim != 2 or {rows.shape[1], len(mean), len(deviation)} != {feature_dim} or limit.shape != (1,):
            raise ReleaseCorrupt(f"{path.name} is not of {feature_dim} features", file=path.name)
        return cls(rows, mean, deviation, float(limit[0]))


def _unit(rows: FloatArray) -> FloatArray:
    return np.asarray(rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-9), dtype=np.float32)


def _distances(rows: FloatArray, others: FloatArray) -> FloatArray:
    """[p, l] between unit rows."""
    return np.asarray(np.sqrt(np.maximum(2.0 - 2.0 * rows @ others.T, 0.0)), dtype=np.float32)
