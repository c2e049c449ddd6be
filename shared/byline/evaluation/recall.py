"""How much of the teacher's top survives a shortlist.

Why it exists: verification only sees the candidates the student hands on, so what matters there is not the order
within the shortlist but whether the teacher's top items are in it at all.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]


def recall_at(scores: FloatArray, tau: FloatArray, cutoff: int, k: int) -> npt.NDArray[np.float64]:
    """Per query, the share of the teacher's top ``cutoff`` found in the predicted top ``k``: [q] in [0, 1].

    ``scores`` and ``tau`` are [q, n]; items the teacher did not score (NaN) take no part. NaN for a query
    without scored items.
    """
    out = np.full(tau.shape[0], np.nan, dtype=np.float64)
    for row in range(tau.shape[0]):
        scored = np.flatnonzero(~np.isnan(tau[row]))
        if scored.shape[0] == 0:
            continue
        top = scored[np.argsort(-tau[row, scored], kind="stable")[:cutoff]]
        shortlist = scored[np.argsort(-scores[row, scored], kind="stable")[:k]]
        out[row] = float(np.isin(top, shortlist).mean())
    return out
