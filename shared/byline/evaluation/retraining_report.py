"""From rows of retrainings and scores of teachers to the two tables: LDS, and leave-k-out.

Why it exists: both are read again and again while retrainings are still running, from the command line, by tests and
for the docs; nothing here trains or scores anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from byline.evaluation.counterfactual import (
    Arm,
    Contrast,
    paired_difference,
    plain_change,
    relative_change,
    summarise_contrast,
    target_contrast,
)
from byline.evaluation.lds import DoubleArray, LdsScore, judge_lds, predictions
from byline.evaluation.retraining import Outcome, Retraining, without


@dataclass(frozen=True)
class LdsTable:
    """LDS of every variant, best first; ``pictures`` are the same with the regenerated picture's change as witness."""

    losses: dict[str, LdsScore]
    pictures: dict[str, LdsScore]
    retrainings: int

    def to_json(self, reference: str) -> dict[str, Any]:
        """The figures of the result file."""
        rows = [
            {
                "variant": name, "lds": s.mean, "error": s.error, "error_queries": s.error_queries,
                "error_subsets": s.error_subsets, "pooled": s.pooled, "lds_pictures": self.pictures[name].mean,
                "lead_of_reference": None if s.lead is None else s.lead.mean,
                "lead_error": None if s.lead is None else s.lead.error, "per_query": s.per_query.round(4).tolist(),
            }
            for name, s in self.losses.items()
        ]  # fmt: skip
        return {"retrainings": self.retrainings, "reference": reference, "variants": rows}


def lds_table(
    halves: Sequence[Outcome], item_ids: np.ndarray[Any, np.dtype[np.int64]], tau: Mapping[str, DoubleArray],
    reference: str, seed: int = 0,
) -> LdsTable:  # fmt: skip
    """Judge all variants (tau [q, n]) by the half-corpus retrainings that are there."""
    kept = np.stack([~np.isin(item_ids, np.array(h.removed, dtype=np.int64)) for h in halves])
    predicted = {name: predictions(t, kept) for name, t in tau.items()}
    named = reference if reference in tau else None
    by_loss = judge_lds(predicted, np.array([h.losses for h in halves]), reference=named, seed=seed)
    by_picture = judge_lds(predicted, np.array([h.pixel_mse for h in halves]), reference=named, seed=seed, draws=20)
    order = sorted(by_loss, key=lambda name: -by_loss[name].mean)
    return LdsTable({n: by_loss[n] for n in order}, {n: by_picture[n] for n in order}, len(halves))


@dataclass(frozen=True)
class CounterfactualRow:
    """One method at one k: contrasts of the loss (per cent), of the picture's squared error (x 1000) and of its
    likeness; ``lead`` is the reference's loss contrast minus this method's, on the same targets."""

    method: str
    k: int
    loss: Contrast
    picture: Contrast
    cosine: Contrast
    lead: Contrast | None


def counterfactual_table(
    arms: Sequence[Arm], rows: Mapping[str, Outcome], study_id: str, nothing: Sequence[Outcome], reference: str
) -> list[CounterfactualRow]:
    """All methods and k of which an arm has been run, by k, the largest rise first."""
    base = {field: np.array([getattr(o, field) for o in nothing]) for field in ("losses", "pixel_mse", "cosine")}
    found: dict[tuple[str, int], dict[str, dict[int, float]]] = {}
    for arm in arms:
        outcome = rows.get(without(arm.removed).key(study_id))
        if outcome is None:
            continue
        changes = {
            "losses": relative_change(np.array(outcome.losses), base["losses"]),
            "pixel_mse": 1000 * plain_change(np.array(outcome.pixel_mse), base["pixel_mse"]),
            "cosine": plain_change(np.array(outcome.cosine), base["cosine"]),
        }
        cell = found.setdefault((arm.method, arm.k), {field: {} for field in changes})
        for field, change in changes.items():
            cell[field].update(target_contrast(change, arm.targets))
    table = [
        CounterfactualRow(
            method, k, summarise_contrast(cell["losses"]), summarise_contrast(cell["pixel_mse"]),
            summarise_contrast(cell["cosine"]),
            lead=None if method == reference or (reference, k) not in found
            else paired_difference(found[reference, k]["losses"], cell["losses"]),
        )
        for (method, k), cell in found.items()
    ]  # fmt: skip
    return sorted(table, key=lambda row: (row.k, -row.loss.mean))


def counterfactual_json(table: Sequence[CounterfactualRow], reference: str, retrainings: int) -> dict[str, Any]:
    """The figures of the result file."""
    rows = [
        {
            "method": r.method, "k": r.k, "targets": len(r.loss.per_target), "loss_percent": r.loss.mean,
            "loss_error": r.loss.error, "picture_mse_e3": r.picture.mean, "picture_error": r.picture.error,
            "cosine": r.cosine.mean, "cosine_error": r.cosine.error,
            "lead_of_reference": None if r.lead is None else r.lead.mean,
            "lead_error": None if r.lead is None else r.lead.error,
            "loss_per_target": {str(t): round(v, 4) for t, v in r.loss.per_target.items()},
        }
        for r in table
    ]  # fmt: skip
    return {"retrainings": retrainings, "reference": reference, "rows": rows}


def retraining_rows(retrainings: Sequence[Retraining], rows: Mapping[str, Outcome], study_id: str,
                    labels: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One JSON row per finished retraining: seed, how many were left out, measures; ``labels`` by key."""
    found = []
    for key in dict.fromkeys(r.key(study_id) for r in retrainings):
        if key in rows:
            outcome = rows[key]
            found.append({
                "key": key, "label": labels.get(key), "seed": outcome.seed, "removed": len(outcome.removed),
                "losses": [round(v, 6) for v in outcome.losses], "pixel_mse": [round(v, 6) for v in outcome.pixel_mse],
                "cosine": [None if np.isnan(v) else round(v, 5) for v in outcome.cosine], "seconds": outcome.seconds,
            })  # fmt: skip
    return found
