"""How far two teachers agree on the same candidates, and what that decides.

Why it exists: the first-order form may make labels only if it orders candidates as the exact form does, or as closely
as the exact form agrees with itself under other noise (design §9). These are the figures and the rule, as functions
of scores alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: Measures of agreement, by their names in result files; overlap at 20 and at 100.
MEASURES = ("spearman", "overlap20", "overlap100")
#: The absolute bar of the gate.
SPEARMAN_BAR = 0.95
OVERLAP_BAR = 0.85

Scores = NDArray[np.floating]


@dataclass(frozen=True)
class Figure:
    """A mean over queries with the standard error of that mean; nan where nothing was measured."""

    mean: float
    standard_error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """Mean of ``values``; the standard error of a single one is nan."""
        found = np.asarray([value for value in values if not math.isnan(value)], dtype=np.float64)
        if not len(found):
            return cls(math.nan, math.nan)
        error = float(found.std(ddof=1) / math.sqrt(len(found))) if len(found) > 1 else math.nan
        return cls(float(found.mean()), error)


@dataclass(frozen=True)
class Decision:
    """Whether the cheaper form may stand in for the exact one, and the sentence that says why."""

    passed: bool
    why: str


def spearman(one: Scores, two: Scores) -> float:
    """Rank correlation of two score vectors [n]; ties share their mean rank. nan for fewer than two, or no spread."""
    a, b = _ranks(one), _ranks(two)
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt(float(a @ a) * float(b @ b)) if len(a) > 1 else 0.0
    return float(a @ b) / size if size > 0 else math.nan


def overlap(one: Scores, two: Scores, k: int) -> float:
    """Share of the k highest of ``one`` among the k highest of ``two``; nan unless k is below the number of scores.

    Ties are broken by position, alike in both.
    """
    if k >= len(one):
        return math.nan
    first, second = (set(np.lexsort((np.arange(len(s)), -s))[:k].tolist()) for s in (one, two))
    return len(first & second) / k


def slope(one: Scores, two: Scores) -> float:
    """Slope of the least-squares line of ``two`` on ``one``: 1 where both are the same quantity in the same unit."""
    a = one.astype(np.float64) - one.mean()
    size = float(a @ a)
    return float(a @ (two.astype(np.float64) - two.mean())) / size if size > 0 else math.nan


def agreement(one: Scores, two: Scores) -> dict[str, float]:
    """All ``MEASURES`` of two score vectors over the same candidates."""
    return {"spearman": spearman(one, two), "overlap20": overlap(one, two, 20), "overlap100": overlap(one, two, 100)}


def summarise(rows: Sequence[Mapping[str, float]]) -> dict[str, Figure]:
    """Mean and standard error of every measure over queries."""
    return {name: Figure.of([row[name] for row in rows]) for name in MEASURES}


def decide(gate: Mapping[str, Figure], self_agreement: Mapping[str, Figure]) -> Decision:
    """The gate of design §9, on first order against exact (``gate``) and exact against exact (``self_agreement``).

    Passed when Spearman and overlap@100 reach their bars, or when neither lies more than two standard errors below
    the exact form's agreement with itself under independent noise.
    """
    found = {name: gate[name].mean for name in ("spearman", "overlap100")}
    if any(math.isnan(value) for value in found.values()):
        return Decision(False, "not decided: Spearman and overlap@100 need more than 100 candidates a query")
    figures = f"Spearman {found['spearman']:.4f} and overlap@100 {found['overlap100']:.3f}"
    if found["spearman"] >= SPEARMAN_BAR and found["overlap100"] >= OVERLAP_BAR:
        return Decision(True, f"{figures} reach {SPEARMAN_BAR} and {OVERLAP_BAR}")
    floor = {name: self_agreement[name].mean - 2 * _known(self_agreement[name].standard_error) for name in found}
    limits = f"{floor['spearman']:.4f} and {floor['overlap100']:.3f} (the exact form against itself, less 2 s.e.)"
    if all(found[name] >= floor[name] for name in found):
        return Decision(True, f"{figures} reach {limits}")
    return Decision(False, f"{figures} reach neither {SPEARMAN_BAR} and {OVERLAP_BAR} nor {limits}")


def _known(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def _ranks(scores: Scores) -> NDArray[np.float64]:
    """Mean ranks from 0."""
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: NDArray[np.float64] = (ends - (counts + 1) / 2)[place]
    return ranks
