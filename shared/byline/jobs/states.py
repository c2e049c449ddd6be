"""The states of a job and the only changes between them, as pure data and functions.

Why it exists: whoever asks "may this happen?" (the store, the tests' model, the documentation) reads one
table. It knows nothing of a database, a clock or a worker.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from byline.errors import IllegalTransition


class State(StrEnum):
    """Where a job is. Past participles are terminal: entered once, never left."""

    #: Waiting for a worker to claim its current stage (also between two stages, and between attempts).
    QUEUED = "QUEUED"
    #: A worker holds the lease on its current stage.
    RUNNING = "RUNNING"
    #: Cancellation was asked for while a worker held the lease; the worker sees it at its next check.
    CANCELLING = "CANCELLING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


class Stage(StrEnum):
    """What a worker does for a job in one claim."""

    #: Embed the query and search the index (fast queue).
    LOOKUP = "lookup"
    #: One query gradient against all sketches (slow queue).
    ESTIMATE = "estimate"
    #: The exact teacher on the candidates of the lookup (slow queue).
    VERIFY = "verify"
    #: A teacher's ranking of a curation query (slow queue).
    RANK = "rank"


class Tier(StrEnum):
    """How good an answer the client asked for."""

    RETRIEVED = "RETRIEVED"
    ESTIMATED = "ESTIMATED"
    VERIFIED = "VERIFIED"


class Verification(StrEnum):
    """Whether a job whose verification fails is FAILED, or SUCCEEDED with its retrieved answer."""

    REQUIRED = "REQUIRED"
    BEST_EFFORT = "BEST_EFFORT"


class Kind(StrEnum):
    """A client's question, or a label for the student."""

    ATTRIBUTION = "attribution"
    RANKING = "ranking"


TERMINAL: frozenset[State] = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})

#: From each state, the states it may change to. RUNNING to RUNNING is a take-over of an expired lease.
TRANSITIONS: Mapping[State, frozenset[State]] = {
    # A queued job ends without running when it is cancelled, its time is up, or its last attempt was used;
    # it SUCCEEDS from the queue only if a best-effort verification ran out of time.
    State.QUEUED: frozenset({State.RUNNING, State.CANCELLED, State.FAILED, State.SUCCEEDED}),
    State.RUNNING: frozenset({State.RUNNING, State.QUEUED, State.CANCELLING, State.SUCCEEDED, State.FAILED}),
    State.CANCELLING: frozenset({State.CANCELLED}),
    State.SUCCEEDED: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
}

#: The stages of an attribution job in order, for each tier. VERIFIED needs the lookup's candidates only.
_PATHS: Mapping[Tier, tuple[Stage, ...]] = {
    Tier.RETRIEVED: (Stage.LOOKUP,),
    Tier.ESTIMATED: (Stage.LOOKUP, Stage.ESTIMATE),
    Tier.VERIFIED: (Stage.LOOKUP, Stage.VERIFY),
}


def check_transition(before: State, after: State) -> None:
    """Raise ``IllegalTransition`` unless the table allows ``before`` to become ``after``."""
    if after not in TRANSITIONS[before]:
        raise IllegalTransition(f"a job that is {before} cannot become {after}", from_state=before, to_state=after)


def first_stage(kind: Kind) -> Stage:
    """The stage a new job of this kind starts in."""
    return Stage.RANK if kind == Kind.RANKING else Stage.LOOKUP


def next_stage(stage: Stage, tier: Tier) -> Stage | None:
    """The stage after ``stage`` of a job that asked for ``tier``; None when the job is done."""
    path = _PATHS[tier]
    if stage not in path or stage == path[-1]:
        return None
    return path[path.index(stage) + 1]


def stages(kind: Kind, tier: Tier) -> tuple[Stage, ...]:
    """Every stage a job of this kind and tier goes through, in order."""
    return (Stage.RANK,) if kind == Kind.RANKING else _PATHS[tier]
