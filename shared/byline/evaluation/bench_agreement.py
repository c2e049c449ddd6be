"""Agreement of scores with a reference, and what equal agreement costs.

Why it exists: a teacher with half the draws is twice as fast and worse, so two forms may only be compared where they
agree equally well with a third, of independent noise, that neither has a part in.
"""

from __future__ import annotations

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


def cheapest(
    table: Mapping[tuple[int, int], float], target: float, query_cost: float, item_cost: float
) -> Choice:
    """The cheapest (query draws, item draws) of ``table`` whose agreement reaches ``target``; else the best there is.

    ``query_cost`` and ``item_cost``: seconds for one draw of all queries, and of all items.
    """
    choices = [
        Choice(k, t, found, k * query_cost + t * item_cost) for (k, t), found in sorted(table.items())
    ]  # fmt: skip
    if not choices:
        raise LabelsNotUsable("no agreement has been measured")
    reached = [choice for choice in choices if choice.agreement >= target]
    return min(reached, key=lambda c: c.cost) if reached else max(choices, key=lambda c: c.agreement)


def draws_for(target: float, draws: Sequence[int], found: Sequence[float]) -> float | None:
    """Draws at which agreement reaches ``target``, linear in log draws between those measured; None if never."""
    previous: tuple[int, float] | None = None
    for count, value in sorted(zip(draws, found, strict=True)):
        if value >= target:
            if previous is None or value == previous[1]:
                return float(count)
            share = (target - previous[1]) / (value - previous[1])
            return float(np.exp(np.log(previous[0]) + share * (np.log(count) - np.log(previous[0]))))
        previous = (count, value)
    return None


def _order(scores: Scores) -> npt.NDArray[np.int64]:
    """Places, best first."""
    return np.argsort(-scores, kind="stable")
