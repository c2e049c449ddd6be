"""One call that calibrates a head and judges the calibration: for the trainer and for ``byline evaluate calibration``.

Why it exists: both must do exactly the same, with the same rule of what may judge what: curve and floors are fitted
on validation queries and judged on test queries; without test queries nothing is claimed of the curve.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from byline.evaluation.abstention import AbstentionReport, Nulls, fit_abstention, report_abstention
from byline.evaluation.calibration import Calibrator
from byline.evaluation.calibration_fit import fit_curve, judged_rows
from byline.evaluation.calibration_report import CalibrationReport, report_calibration

FloatArray = npt.NDArray[np.float32]
#: With fewer validation queries than this nothing is said: an interval of 90 % has no meaning on them.
MINIMUM_QUERIES = 10
#: Share of each kind of null queries that may pass.
ALLOWED = 0.05


@dataclass(frozen=True)
class ScoredQueries:
    """Real queries as a head sees them: ``scores``, ``tau`` [q, n] (NaN: not scored), ``evidence`` [q] or None."""

    scores: FloatArray
    tau: FloatArray
    evidence: FloatArray | None = None

    @property
    def best(self) -> npt.NDArray[np.float64]:
        """[q]: the best item's score."""
        return np.asarray(self.scores.max(1), dtype=np.float64)

    def pair(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64] | None]:
        """(best score, evidence)."""
        return self.best, None if self.evidence is None else self.evidence.astype(np.float64)

    def rows(self, places: npt.NDArray[Any]) -> ScoredQueries:
        """Some of them."""
        return ScoredQueries(self.scores[places], self.tau[places],
                             None if self.evidence is None else self.evidence[places])


@dataclass(frozen=True)
class ScoredNulls:
    """Null queries as a head sees them; ``best``, ``evidence`` [m]."""

    kind: tuple[str, ...]
    source: tuple[str, ...]
    best: npt.NDArray[np.float64]
    evidence: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """A calibrator and what it is worth on queries it was not fitted on; ``why_not`` says what it lacks, and why."""

    calibrator: Calibrator
    curve: CalibrationReport | None
    abstention: AbstentionReport | None
    why_not: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As kept in a release's metrics."""
        return {
            "curve": None if self.curve is None else self.curve.to_json(),
            "abstention": None if self.abstention is None else self.abstention.to_json(),
            "left_out": list(self.why_not),
        }


def fit_calibrator(validation: ScoredQueries, test: ScoredQueries | None, nulls: ScoredNulls | None, *, top: int,
                   seed: int, encoder: tuple[str, str] = ("", ""),
                   shuffled: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None = None) -> Calibration:
    """Fit on ``validation``, judge on ``test`` (None: the curve is not judged).

    ``top`` is L. ``shuffled`` (best score, evidence) are real images under other prompts, only reported.
    """
    why: list[str] = []
    curve, report = None, None
    usable = judged_rows(validation.tau, top)
    if len(usable) < MINIMUM_QUERIES:
        why.append(f"no probabilities: {len(usable)} validation queries have {2 * top} scored items, "
                   f"{MINIMUM_QUERIES} are needed")
    else:
        curve = fit_curve(validation.scores, validation.tau, top=top)
        if test is not None:
            report = report_calibration(curve, test.scores, test.tau, top=top, seed=seed)
    abstention, floors = None, None
    if nulls is None:
        why.append("no noise floor: there are no null queries")
    elif len(validation.scores) < MINIMUM_QUERIES:
        why.append(f"no noise floor: {len(validation.scores)} validation queries, {MINIMUM_QUERIES} are needed")
    else:
        rows = Nulls(nulls.kind, nulls.source, nulls.best, nulls.evidence)
        abstention = fit_abstention(rows, *validation.pair(), encoder=encoder, allowed=ALLOWED)
        judged = test if test is not None else validation
        floors = report_abstention(abstention, rows, validation.pair(), judged.pair(), shuffled, encoder=encoder,
                                   allowed=ALLOWED)
    if test is None:
        why.append("not judged on test queries: there are too few")
    return Calibration(Calibrator(curve, abstention, top), report, floors, tuple(why))
