"""The services' own decisions, as the year calls them.

Why it exists: the library knows no service, yet a year that decided by rules of its own would prove nothing of the
rules in use. Whoever starts a year hands them in (``studies/refresh.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import numpy as np
import numpy.typing as npt

from byline.evaluation.map import MapResult
from byline.ranker.fit import FitReport
from byline.ranker.head import Head, HeadConfig
from byline.ranker.labelled_set import LabelledSet

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


class Choose(Protocol):
    """Curation's planner: which candidates to label, as (index, reason)."""

    def __call__(self, candidates: FloatArray, labelled: FloatArray, disagreement: npt.NDArray[np.float64] | None,
                 groups: IntArray, count: int, uniform_share: float, rng: np.random.Generator
                 ) -> Sequence[tuple[int, str]]:
        """``candidates`` [p, d], ``labelled`` [l, d], ``disagreement`` [p]."""
        ...


@dataclass(frozen=True)
class Seen:
    """What the trainer looks at in a week: rankings for training and validation, items that came and went since the
    active release, and the drift alarm that is open (when, and what it says)."""

    rankings: int
    added: int
    withdrawn: int
    corpus_changed_at: datetime | None
    alarm: tuple[datetime, str] | None


@dataclass(frozen=True)
class Decision:
    """Why to refresh now (empty: wait), and whether heads are to be fitted or the active one published again."""

    triggers: tuple[str, ...]
    learn: bool


class Due(Protocol):
    """The trainer's schedule; ``last`` is (rankings, when) of the newest candidate."""

    def __call__(self, seen: Seen, last: tuple[int, datetime] | None, now: datetime, labels_changed: bool) -> Decision:
        """Whether to refresh now."""
        ...


@dataclass(frozen=True)
class Fitted:
    """The candidate that validates best: its ``start`` (fresh, warm or kept) and validation mAP of every start."""

    report: FitReport
    start: str
    validation: dict[str, float]


class MakeHead(Protocol):
    """The trainer's candidates and its choice among them; ``previous`` is the active head with its slope."""

    def __call__(self, train: LabelledSet, validation: LabelledSet, config: HeadConfig, epochs: int, cutoff: int,
                 seed: int, previous: tuple[Head, float] | None, learn: bool) -> Fitted:
        """Fit and choose."""
        ...


@dataclass(frozen=True)
class Verdict:
    """What the gate says of a candidate."""

    passed: bool
    reasons: tuple[str, ...]
    metrics: dict[str, float]


class Gate(Protocol):
    """The trainer's gate."""

    def __call__(self, scores: FloatArray, tau: FloatArray, candidate: MapResult, active: MapResult | None,
                 slope: float, seed: int) -> Verdict:
        """``scores`` and ``tau`` [q, n] of the candidate on the held-out queries."""
        ...


@dataclass(frozen=True)
class Pieces:
    """All of them; ``digest`` of their code, so that a kept year is never one of other rules."""

    choose: Choose
    due: Due
    make_head: MakeHead
    gate: Gate
    digest: str
