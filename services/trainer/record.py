"""What a candidate's manifest says of how it was made and judged.

Why it exists: a release must be explained by its own manifest, years later and without the log: why the refresh was
begun, what each start reached, what the gate said of each head it saw, which queries judged, and what was left out.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from byline.evaluation.calibrate import Calibration
from byline.evaluation.head_report import HeadReport
from byline.releases.manifest import RefreshSection, RefreshTrigger
from services.trainer.candidates import Candidate, Start
from services.trainer.gate import GateDecision
from services.trainer.labels import RefreshLabels
from services.trainer.schedule import Due


@dataclass(frozen=True)
class Judged:
    """A candidate that the gate saw."""

    candidate: Candidate
    calibration: Calibration
    report: HeadReport
    decision: GateDecision


def refresh_section(due: Sequence[Due], snapshot_at: datetime, chosen: Candidate, tried: Sequence[Candidate],
                    labels: RefreshLabels) -> RefreshSection:
    """The manifest's section ``refresh``."""
    judged = hashlib.sha256()
    for ranking in labels.held_out_rankings:
        judged.update(ranking.query_id.bytes)
    return RefreshSection(
        triggers=tuple(RefreshTrigger(trigger=one.trigger.value, detail=one.detail) for one in due),
        snapshot_at=snapshot_at, start=chosen.start.value,
        validation_map={one.start.value: one.fitted.best_map for one in tried if math.isfinite(one.fitted.best_map)},
        held_out_split=labels.held_out_split, held_out_queries=len(labels.held_out_rankings),
        held_out_digest=judged.hexdigest(),
    )  # fmt: skip


def metrics_of(chosen: Judged, seen: Sequence[Judged], labels: RefreshLabels, no_sketches: str | None
               ) -> dict[str, Any]:
    """The manifest's ``metrics``. ``seen``: every candidate the gate judged, in that order."""
    fitted = chosen.candidate.fitted
    return {
        **chosen.report.to_json(),
        "gate": {**_gate(chosen.decision), "slices": [one.to_json() for one in chosen.decision.slices],
                 "fallback": labels.fallback,
                 "verdicts": [{"start": one.candidate.start.value, **_gate(one.decision)} for one in seen]},
        "fit": {"best_step": fitted.best_step, "validation_map": fitted.best_map, "start_map": fitted.start_map,
                "slope": fitted.slope, "warm_start": chosen.candidate.start is Start.WARM,
                "history": [[point.step, point.validation_map] for point in fitted.history]},
        "labels": {"train": len(labels.splits.train), "validation": len(labels.splits.validation),
                   "test": len(labels.splits.test), "held_out_split": labels.held_out_split,
                   "judged_on_disjoint_noise": labels.other_half is not None},
        "left_out": {**labels.left_out.to_json(), "count": {"items": len(labels.left_out.items),
                                                            "queries": len(labels.left_out.queries)}},
        "sketches": {"left_out": no_sketches}, "calibration": chosen.calibration.to_json(),
    }  # fmt: skip


def left_out_items(metrics: dict[str, Any]) -> int:
    """How many items a release lacks because their image is lost; 0 in a manifest that does not say."""
    return len(metrics.get("left_out", {}).get("items", ()))


def _gate(decision: GateDecision) -> dict[str, Any]:
    # JSON knows no NaN, and Postgres refuses it: what could not be measured is null.
    measured = {name: value if np.isfinite(value) else None for name, value in decision.metrics.items()}
    return {**measured, "passed": decision.passed, "reasons": list(decision.reasons)}
