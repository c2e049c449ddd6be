"""Heads that could be published: started afresh, continued from the active one, or the active one itself.

Why it exists: a warm start is cheap and keeps what was learnt, a fresh one leaves an old optimum; which is better
differs from refresh to refresh, so both are tried and the validation queries decide which the gate sees first; one it
refuses is followed by the next. Where the corpus changed the active head competes too: a new release must not wait for
a better head, and is never worse than the old one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from byline.ranker.fit import FitConfig, FitReport, fit_head, held_out_map
from byline.ranker.head import Head, HeadConfig
from byline.ranker.labelled_set import LabelledSet

Progress = Callable[[str, int, int], None]
#: A warm start takes this part of a fresh one's steps, at this part of its learning rate.
WARM_STEPS, WARM_RATE = 0.25, 0.3


class Start(StrEnum):
    """What a head was continued from."""

    KEPT = "kept"
    WARM = "warm"
    FRESH = "fresh"


@dataclass(frozen=True)
class Candidate:
    """A head and how it was fitted; ``fitted.best_map`` on the validation queries decides."""

    start: Start
    fitted: FitReport


@dataclass(frozen=True)
class Previous:
    """The active release's head and the slope it was judged with; comparable: it takes the same features."""

    head: Head
    slope: float = 1.0


@dataclass(frozen=True)
class FitPlan:
    """How heads are fitted. ``epochs`` counts passes over the training queries; ``cutoff`` is the L of mAP(L);
    ``weighted`` as in ``FitConfig``."""

    loss: str
    epochs: int
    cutoff: int
    weighted: bool = False


def fit_candidates(
    train: LabelledSet, validation: LabelledSet, config: HeadConfig, plan: FitPlan, seed: int,
    previous: Previous | None, *, keep: bool, learn: bool, progress: Progress,
) -> list[Candidate]:  # fmt: skip
    """Every head worth judging. ``keep``: the previous one may be published again; ``learn``: fit new ones.

    Without a previous head a fresh one is fitted, whatever ``learn`` says.
    """
    base = FitConfig(loss=plan.loss, evaluate_at=plan.cutoff, weighted=plan.weighted)
    found = []
    if keep and previous is not None:
        quality = held_out_map(previous.head, validation, base)
        found.append(Candidate(Start.KEPT, FitReport(previous.head, (), quality, 0, quality, previous.slope)))
    if not learn and previous is not None:
        return found
    passes = -(-train.queries // base.queries_per_step)
    steps = max(1, plan.epochs * passes)
    if previous is not None and replace(previous.head.config, width=config.width) == config:
        warm = _config(base, max(1, int(steps * WARM_STEPS)), WARM_RATE)
        fitted = fit_head(train, validation, config, warm, seed,
                          lambda done, total: progress("continue the head", done, total), previous.head)
        found.append(Candidate(Start.WARM, fitted))
    fitted = fit_head(train, validation, config, _config(base, steps, 1.0), seed,
                      lambda done, total: progress("fit the head", done, total))
    return [*found, Candidate(Start.FRESH, fitted)]


def by_validation(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The highest mAP on the validation queries first; of equals that which changes the least."""
    return sorted(candidates, key=lambda one: _order(one.fitted.best_map), reverse=True)


def _order(quality: float) -> float:
    return quality if math.isfinite(quality) else -math.inf


def _config(base: FitConfig, steps: int, rate: float) -> FitConfig:
    return replace(base, max_steps=steps, evaluate_every=max(1, min(base.evaluate_every, steps // 4)),
                   learning_rate=base.learning_rate * rate)
