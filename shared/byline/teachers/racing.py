"""A race for the top: noise is spent where the order is still undecided.

Why it exists: most candidates are far below the top L after a few draws, and every further draw on
them is wasted. After each round (one replicate of noise for every candidate still in) a candidate
whose whole confidence interval lies below the L-th largest lower bound is dropped; the others go on
to the full budget, so what is reported of the top rests on all draws.

The bounds are made for very few replicates. A candidate's own variance from two or three numbers is
worth little, so it is shrunk towards one pooled over the candidates still in (as limma does for
genes; Smyth 2004), and Student's t has the degrees of freedom of both. The pooled one is the square
of the mean standard deviation: the most influential candidates are several times noisier than the
rest, and the mean of the variances would be theirs alone (measured: a race spends .47 of the budget
instead of .59 for the same top). Noise that candidates have in common (a shared scheme) moves all of
them together and decides nothing: the mean over the candidates is taken out of every replicate first.

A pure function of the scores so far: whoever runs the same draws comes to the same decisions, so a
killed race resumes. Stopping by a look at the data biases little here, and in a known direction: a
candidate dropped by bad luck keeps its low estimate, one kept by good luck gets more draws.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

#: One-sided level of each of the two bounds that must not overlap. Two at .9 are about .965 for their difference
#: (1.28 standard errors each against 1.81 of the difference, where both are equal); for one comparison, not for all.
CONFIDENCE = 0.9
#: Replicates every candidate gets before the first decision.
FIRST = 2
#: Degrees of freedom the pooled variance counts for beside a candidate's own.
POOLED_DEGREES = 4.0


def student_quantile(probability: float, degrees: float) -> float:
    """Quantile of Student's t, to three digits from 5 degrees of freedom on (Abramowitz & Stegun 26.7.5)."""
    z = NormalDist().inv_cdf(probability)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


def _mean_of_deviation(count: int) -> float:
    """E[standard deviation of ``count`` normal numbers] / sigma: .798 for two, nearing one (c4 of control charts)."""
    return math.sqrt(2 / (count - 1)) * math.exp(math.lgamma(count / 2) - math.lgamma((count - 1) / 2))


def bounds(
    replicates: NDArray[np.float64], confidence: float = CONFIDENCE
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lower and upper bound [n] of each candidate's score, relative to the mean of all candidates.

    ``replicates`` [o, r, n]: r >= 2 replicates of n candidates in o orientations, of which the
    higher counts. Both bounds are one-sided at ``confidence``.
    """
    count = replicates.shape[1]
    centred = replicates - replicates.mean(axis=(0, 2), keepdims=True)
    mean = centred.mean(axis=1)  # [o, n]
    own = centred.var(axis=1, ddof=1)
    degrees = POOLED_DEGREES + count - 1
    pooled = (np.sqrt(own).mean() / _mean_of_deviation(count)) ** 2
    variance = (POOLED_DEGREES * pooled + (count - 1) * own) / degrees
    margin = student_quantile(confidence, degrees) * np.sqrt(variance / count)
    return (mean - margin).max(axis=0), (mean + margin).max(axis=0)


def still_in(replicates: NDArray[np.float64], top: int, confidence: float = CONFIDENCE) -> NDArray[np.bool_]:
    """Which candidates [n] may still belong to the ``top``; ``replicates`` as for ``bounds``.

    Never fewer than ``top`` of them: those with the largest lower bounds stay by construction.
    """
    if replicates.shape[2] <= top or replicates.shape[1] < FIRST:
        return np.ones(replicates.shape[2], dtype=bool)
    lower, upper = bounds(replicates, confidence)
    boundary = np.partition(lower, len(lower) - top)[len(lower) - top]  # the top-th largest
    return np.asarray(upper >= boundary)
