"""``make study-refresh``: a simulated year of the loop with the services' own rules.

Why it exists: the library knows no service, and no service knows another; planner, schedule and gate meet here only.

    python -m studies.refresh --size demo
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from datetime import datetime, timedelta

import numpy as np
import numpy.typing as npt

from byline.cli.study_refresh import main
from byline.evaluation.map import MapResult
from byline.ranker.head import Head, HeadConfig
from byline.ranker.labelled_set import LabelledSet
from byline.simulation.pieces import Decision, Fitted, Pieces, Seen, Verdict
from services.curation import selection
from services.trainer import candidates as starts
from services.trainer import gate, schedule

FloatArray = npt.NDArray[np.float32]
#: A week is the clock's step: rankings of three or four weeks make a refresh, any new one after five.
RULE = schedule.RefreshRule(min_new=8, interval=timedelta(weeks=5))
#: Floor, tolerance and confidence as in the trainer's settings.
LIMITS = gate.GateLimits(map_floor=0.05, tolerance=0.01, confidence=0.95)


def choose(candidates: FloatArray, labelled: FloatArray, disagreement: npt.NDArray[np.float64] | None,
           groups: npt.NDArray[np.int64], count: int, uniform_share: float, rng: np.random.Generator
           ) -> Sequence[tuple[int, str]]:
    """Curation's planner. The uniform share is drawn from what waits: nothing is estimated from it here."""
    names = np.unique(groups)
    by_chance = rng.choice(names, size=selection.uniform_count(min(count, len(names)), uniform_share, rng),
                           replace=False)  # fmt: skip
    drawn = [int(rng.choice(np.flatnonzero(groups == name))) for name in by_chance]
    asked, known = selection.comparable(candidates, labelled)
    found = selection.select_queries(asked, known, count=count, drawn=drawn, rng=rng, disagreement=disagreement,
                                     groups=groups)
    return [(one.index, one.reason) for one in found]


def due(seen: Seen, last: tuple[int, datetime] | None, now: datetime, labels_changed: bool) -> Decision:
    """The trainer's schedule."""
    corpus = None
    if seen.added or seen.withdrawn:
        corpus = schedule.CorpusChange(seen.added, seen.withdrawn, seen.corpus_changed_at)
    alarm = schedule.DriftAlarm(*seen.alarm) if seen.alarm else None
    before = schedule.LastRefresh(*last) if last else None
    found = schedule.refresh_due(schedule.Observed(seen.rankings, corpus, alarm), before, now, RULE)
    return Decision(tuple(f"{one.trigger}: {one.detail}" for one in found), schedule.needs_fit(found, labels_changed))


def make_head(train: LabelledSet, validation: LabelledSet, config: HeadConfig, epochs: int, cutoff: int, seed: int,
              previous: tuple[Head, float] | None, learn: bool) -> Fitted:
    """The trainer's candidates: fresh, continued from the active head, or that head itself."""
    found = starts.fit_candidates(
        train, validation, config, starts.FitPlan("listwise", epochs, cutoff), seed,
        starts.Previous(*previous) if previous else None, keep=not learn, learn=learn,
        progress=lambda what, done, total: None,
    )  # fmt: skip
    best = starts.by_validation(found)[0]
    return Fitted(best.fitted, best.start.value, {one.start.value: one.fitted.best_map for one in found})


def judge(scores: FloatArray, tau: FloatArray, candidate: MapResult, active: MapResult | None, slope: float, seed: int
          ) -> Verdict:
    """The trainer's gate; without calibration, which a year's few held-out queries cannot judge."""
    evidence = gate.GateEvidence(candidate, active, slope, gate.score_agreement(scores, tau))
    decision = gate.judge(evidence, LIMITS, seed)
    return Verdict(decision.passed, decision.reasons, decision.metrics)


def pieces() -> Pieces:
    """The rules in use, and a digest of their code and of the limits."""
    digest = hashlib.sha256(f"{RULE}{LIMITS}".encode())
    for module in (selection, starts, gate, schedule):
        digest.update(inspect.getsource(module).encode())
    return Pieces(choose, due, make_head, judge, digest.hexdigest()[:12])


if __name__ == "__main__":
    main(None, pieces())
