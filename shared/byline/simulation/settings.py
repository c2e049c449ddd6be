"""How long the year is, what happens in it, and how much the loop may spend.

Why it exists: every figure of docs/refresh.md depends on these numbers, so they are one value that goes into the
result file, and nothing else decides them.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from byline.drift.windows import DriftRule

ACTIVE, RANDOM, RECENT = "active", "random", "recent"
#: How queries are chosen: the planner; uniformly of all that wait; uniformly of those that last week's traffic asks.
ARMS = (ACTIVE, RANDOM, RECENT)


@dataclass(frozen=True)
class Subject:
    """A head whose year is simulated, in some ``arms``, with ``seeds`` worlds (the first ones)."""

    encoders: tuple[str, ...]
    arms: tuple[str, ...] = ARMS
    seeds: int = 3

    @property
    def name(self) -> str:
        """As a FeatureSpec is written."""
        return "+".join(self.encoders)


@dataclass(frozen=True)
class YearSettings:
    """Weeks count from 0. ``leaning``: share of live prompts from the topic of the half-year; the rest from the other.

    Shares of artists are of all; ``start_*`` and ``*_per_week`` count labels; held-out ones go to validation and gate
    in turn. ``epochs`` are passes of a fresh fit over the training queries. ``shadows`` live lookups a week are ranked
    by the teacher to see drift, and never become labels.
    """

    subjects: tuple[Subject, ...] = (
        Subject(("minilm", "denoiser"), seeds=5), Subject(("minilm", "gradient"), (ACTIVE, RANDOM), 1),
    )
    weeks: int = 52
    join_week: int = 13
    shift_week: int = 26
    withdraw_week: int = 39
    leaning: float = 0.9
    new_artists: float = 0.2
    withdrawn_artists: float = 0.05
    live_share: float = 0.25
    held_out_share: float = 0.1
    start_train: int = 12
    start_validation: int = 8
    start_gate: int = 10
    train_per_week: int = 2
    held_out_per_week: int = 1
    uniform_share: float = 0.2
    shadows: int = 12
    cutoff: int = 100
    hidden: tuple[int, ...] = (256,)
    out_dim: int = 256
    epochs: int = 40
    drift: DriftRule = DriftRule(timedelta(weeks=2), 4, 0.02, 8)
    begins: datetime = datetime(2027, 1, 4, tzinfo=UTC)

    def day(self, week: int) -> datetime:
        """The simulated time of a week's end."""
        return self.begins + timedelta(weeks=week)

    def traffic(self, week: int) -> tuple[float, float]:
        """Shares of the two topics among live prompts."""
        return (self.leaning, 1 - self.leaning) if week < self.shift_week else (1 - self.leaning, self.leaning)


_DEMO = YearSettings()
SIZES = {
    "demo": _DEMO,
    "fuller": YearSettings(
        subjects=(Subject(("minilm", "denoiser"), seeds=8), Subject(("minilm", "gradient"), seeds=3)),
        hidden=(512, 512), out_dim=512,
    ),
    "tiny": YearSettings(
        subjects=(Subject(("minilm", "denoiser"), (ACTIVE, RANDOM), 2),), weeks=8, join_week=2, shift_week=4,
        withdraw_week=6, start_train=6, start_validation=3, start_gate=3, train_per_week=2, shadows=8, cutoff=8,
        hidden=(16,), out_dim=16, epochs=8,
    ),
}  # fmt: skip
