"""Is one method better than another on the same queries, or was it the draw of queries?

Why it exists: forty held-out queries differ from each other far more than two methods do; only the paired difference,
resampled over queries, tells a gain from luck. The release gate and every comparison table use this one function.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from byline.errors import LabelsNotUsable

DoubleArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PairedDifference:
    """Mean of ``a − b`` with an interval (95 % by default); ``p_value`` is one-sided, for "a is not better than b"."""

    mean: float
    low: float
    high: float
    p_value: float
    queries: int


def paired_bootstrap(a: DoubleArray, b: DoubleArray, *, seed: int, draws: int = 10_000,
                     lower_quantile: float = 0.025) -> PairedDifference:
    """Compare per-query values ``a`` [q] with ``b`` [q] of the same queries by resampling queries ``draws`` times.

    The interval is from ``lower_quantile`` to its mirror image, 95 % by default.
    """
    if a.shape != b.shape or a.ndim != 1 or a.shape[0] == 0:
        raise LabelsNotUsable(f"a paired comparison needs the same queries on both sides, got {a.shape} and {b.shape}")
    difference = a - b
    q = difference.shape[0]
    rng = np.random.default_rng(seed)
    means = np.concatenate([
        difference[rng.integers(0, q, size=(min(1000, draws - start), q))].mean(1) for start in range(0, draws, 1000)
    ])
    low, high = np.quantile(means, [lower_quantile, 1.0 - lower_quantile])
    # Never exactly zero: with finitely many draws "no draw was worse" bounds p, it does not make it vanish.
    p_value = (1.0 + float((means <= 0).sum())) / (1.0 + means.shape[0])
    return PairedDifference(float(difference.mean()), float(low), float(high), p_value, q)
