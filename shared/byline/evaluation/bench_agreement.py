"""Agreement of scores with a reference, and what equal agreement costs.

Why it exists: a teacher with half the draws is twice as fast and worse, so two forms may only be compared where they
agree equally well with a third, of independent noise, that neither has a part in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from byline.errors import LabelsNotUsable
from byline.evaluation.agreement import Figure, overlap, spearman
from byline.evaluation.map import average_precision

Scores = npt.NDArray[np.float64]
#: Cut-offs of the overlap, and that of mAP.
OVERLAPS = (20, 100)
MAP_CUTOFF = 100


@dataclass(frozen=True)
class Choice:
    """Draws of a query's gradient and of an item's loss, the agreement they reach and what they cost."""

    query_draws: int
    item_draws: int
    agreement: float
    cost: float


def agreement(scores: Scores, reference: Scores) -> dict[str, float]:
    """Means over queries of Spearman, overlap of the tops and mAP; ``spearman_error`` is its standard error.

    ``scores``, ``reference`` [q, n], higher = more influential; cut-offs that n does not exceed are left out.
    LabelsNotUsable when the shapes differ.
    """
    if scores.shape != reference.shape or scores.ndim != 2:
        raise LabelsNotUsable(f"scores {scores.shape} and reference {reference.shape} must both be [queries, items]")
    pairs = list(zip(scores, reference, strict=True))
    correlation = Figure.of([spearman(a, b) for a, b in pairs])
    found = {"spearman": correlation.mean}
    if len(pairs) > 1:
        found["spearman_error"] = correlation.standard_error
    for cutoff in OVERLAPS:
        if cutoff < scores.shape[1]:
            found[f"overlap{cutoff}"] = float(np.mean([overlap(a, b, cutoff) for a, b in pairs]))
    if scores.shape[1] > MAP_CUTOFF:
        precision = [average_precision(_order(a), _order(b)[:MAP_CUTOFF]) for a, b in pairs]
        found[f"map{MAP_CUTOFF}"] = float(np.mean(precision))
    return found


def evenly(replicates: int, wanted: int) -> list[int]:
    """``wanted`` of ``replicates`` numbers, spread evenly: their draws cover the timesteps like a smaller budget's."""
    return [i * replicates // wanted for i in range(wanted)]


@dataclass(frozen=True)
class Curve:
    """Agreement as a function of item draws: 1 / rho^2 = floor + noise / draws.

    What independent noise of variance ``noise`` / draws in one of two scores does to their correlation; ``floor`` > 1
    is the noise of the query's gradient and of the reference. Fitted over all budgets, it evens out the luck of one.
    """

    floor: float
    noise: float

    @classmethod
    def fit(cls, draws: Sequence[int], found: Sequence[float]) -> Curve:
        """Least squares over budgets. LabelsNotUsable for fewer than two."""
        if len(set(draws)) < 2:
            raise LabelsNotUsable("a curve of agreement needs at least two budgets")
        # A correlation that is not positive says nothing of how much noise there is; it is as good as none.
        squares = 1 / np.clip(np.asarray(found, dtype=np.float64), 0.05, 1.0) ** 2
        noise, floor = np.polyfit(1 / np.asarray(draws, dtype=np.float64), squares, 1)
        return cls(max(float(floor), 1e-9), max(float(noise), 0.0))

    def at(self, draws: float) -> float:
        """Agreement at a budget."""
        return float((self.floor + self.noise / draws) ** -0.5)

    def draws(self, target: float) -> float | None:
        """The budget that reaches ``target``; None if none does."""
        gap = target**-2 - self.floor
        return self.noise / gap if gap > 0 else None


def cheapest(
    curves: Mapping[int, Curve], target: float, *, unit: int, most: int, query_cost: float, item_cost: float
) -> Choice:
    """The cheapest (query draws, item draws) that reaches ``target``; else, at ``most`` item draws, the best there is.

    ``curves`` by query draws; item draws are a multiple of ``unit``. ``query_cost`` and ``item_cost``: of one draw of
    all queries, and of all items.
    """
    choices = []
    for k, curve in sorted(curves.items()):
        needed = curve.draws(target)
        draws = most if needed is None else min(most, max(unit, math.ceil(needed / unit - 1e-9) * unit))
        choices.append(Choice(k, draws, curve.at(draws), k * query_cost + draws * item_cost))
    if not choices:
        raise LabelsNotUsable("no agreement has been measured")
    reached = [choice for choice in choices if choice.agreement >= target - 1e-9]
    return min(reached, key=lambda c: c.cost) if reached else max(choices, key=lambda c: c.agreement)


def _order(scores: Scores) -> npt.NDArray[np.int64]:
    """Places, best first."""
    return np.argsort(-scores, kind="stable")
