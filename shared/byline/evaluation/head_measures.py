"""Everything an order of the items is judged by, per query, and two orders compared on the same queries.

Why it exists: mAP(L) says how good the order is, recall how good it is as a shortlist, the top item what a user sees
first, NDCG all of it with one graded weight. One number per query and measure is kept, because only paired
differences over queries tell a gain from luck. Definitions of mAP and recall are those of ``map.py`` and ``recall.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from byline.errors import LabelsNotUsable
from byline.evaluation.bootstrap import PairedDifference, paired_bootstrap
from byline.evaluation.map import mean_average_precision
from byline.evaluation.recall import recall_at

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]

CUTOFFS = (20, 100, 200, 500)
SHORTLISTS = (100, 200, 500, 800)
#: The teacher's items that recall asks for and that have a gain in NDCG.
TOP = 100


@dataclass(frozen=True)
class Order:
    """A way to order the items: ``scores`` [q, n], higher = earlier; a head, raw, direct, no_image or ceiling."""

    name: str
    kind: str
    scores: FloatArray


@dataclass(frozen=True)
class Judged:
    """An order by every measure: values [q] by name, and the first order's gain over it (None for the first)."""

    name: str
    kind: str
    values: Mapping[str, DoubleArray]
    gains: Mapping[str, PairedDifference] | None

    def mean(self, measure: str) -> float:
        """Mean over queries."""
        return float(self.values[measure].mean())

    def standard_error(self, measure: str) -> float:
        """Population standard deviation over queries / √q, as for mAP(L)."""
        values = self.values[measure]
        return float(values.std() / np.sqrt(values.shape[0]))

    def to_json(self) -> dict[str, object]:
        """Plain numbers by measure."""
        return {
            "name": self.name, "kind": self.kind,
            "measures": {
                measure: {"mean": self.mean(measure), "standard_error": self.standard_error(measure)}
                | ({} if self.gains is None else {"head_gain": gain_json(self.gains[measure])})
                for measure in self.values
            },
        }  # fmt: skip


def judge_orders(orders: Sequence[Order], tau: FloatArray, *, seed: int, cutoffs: Sequence[int] = CUTOFFS,
                 shortlists: Sequence[int] = SHORTLISTS) -> tuple[Judged, ...]:
    """Judge every order by the teacher's ``tau`` [q, n] (NaN = not scored), and the first order against all others.

    L and shortlists that leave nothing to choose (as many as the items of the narrowest query, or more) are left out.
    LabelsNotUsable if a query has fewer than two scored items: take such queries out of all orders before.
    """
    if not orders:
        raise LabelsNotUsable("there is no order to judge")
    fewest = int((~np.isnan(tau)).sum(1).min()) if tau.shape[0] else 0
    if fewest < 2:
        raise LabelsNotUsable("every query to judge by needs at least two scored items")
    ls, ks = [c for c in cutoffs if c < fewest], [k for k in shortlists if k < fewest]
    values = [measure(order.scores, tau, ls, ks) for order in orders]
    return tuple(
        Judged(order.name, order.kind, found, None if place == 0 else {
            name: paired_bootstrap(values[0][name], found[name], seed=seed) for name in found
        })
        for place, (order, found) in enumerate(zip(orders, values, strict=True))
    )  # fmt: skip


def measure(scores: FloatArray, tau: FloatArray, cutoffs: Sequence[int], shortlists: Sequence[int]
            ) -> dict[str, DoubleArray]:
    """All measures of one order, [q] each: ``map_L``, ``recall_k`` of the teacher's top 100, ``top1_k``, ``ndcg``.

    ``top1_k`` is 1 where the teacher's first item is among the first k of the order.
    """
    found = {f"map_{cutoff}": mean_average_precision(scores, tau, cutoff).per_query for cutoff in cutoffs}
    found |= {f"recall_{k}": recall_at(scores, tau, TOP, k) for k in shortlists}
    found |= {f"top1_{k}": recall_at(scores, tau, 1, k) for k in (1, 10)}
    found["ndcg"] = ndcg(scores, tau)
    return found


def ndcg(scores: FloatArray, tau: FloatArray, top: int = TOP) -> DoubleArray:
    """Normalised discounted cumulative gain over the whole order, [q].

    The teacher's item at rank r (0 = first) has gain 1 − r/``top``, none from ``top`` on; position p is discounted by
    1/log₂(p + 1). Ties fall to the earlier item, in both orders.
    """
    out = np.empty(tau.shape[0], dtype=np.float64)
    for row in range(tau.shape[0]):
        scored = np.flatnonzero(~np.isnan(tau[row]))
        gain = np.zeros(scored.shape[0])
        best = np.argsort(-tau[row, scored], kind="stable")[:top]
        gain[best] = 1.0 - np.arange(best.shape[0]) / top
        discount = 1.0 / np.log2(np.arange(scored.shape[0]) + 2.0)
        order = np.argsort(-scores[row, scored], kind="stable")
        out[row] = (gain[order] @ discount) / (-np.sort(-gain) @ discount)
    return out


def gain_json(found: PairedDifference) -> dict[str, float]:
    """A paired difference as it stands in result files."""
    return {"mean": found.mean, "low": found.low, "high": found.high, "p_value": found.p_value}
