"""What the clients of a chaos run ask: a list of requests that follows from a seed.

Why it exists: a failing run must be repeatable as far as the machine allows, so what is asked, by whom and in which way
is decided before anything starts. Pure.
"""

from __future__ import annotations

import random
import uuid
from dataclasses import dataclass

from byline.jobs.states import Tier

#: Projects ask unequally, so that fairness has something to do: shares of all jobs.
PROJECTS = (("alpha", 0.55), ("beta", 0.25), ("gamma", 0.15), ("delta", 0.05))


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. ``query`` chooses the picture or embedding; everything else is what the client does with its job."""

    request: str
    project: str
    tier: Tier
    by_embedding: bool
    query: int
    best_effort: bool = False
    #: ``Attribute`` (one call that waits for the answer) instead of ``Create``.
    waits: bool = False
    #: Sent a second time after it was acknowledged.
    repeated: bool = False
    #: Cancelled so many seconds after its acknowledgement.
    cancelled_after_s: float | None = None
    ttl_s: float | None = None
    #: Followed by ``Watch`` to its end.
    watched: bool = False


#: One request in so many is watched: of the fast ones, and of the slow ones.
WATCHED_EVERY, SLOW_WATCHED_EVERY = 6, 2


def plan(jobs: int, seed: int, *, verified: int, estimated: int, by_image: int) -> list[Ask]:
    """``jobs`` requests in the order they are made; the rest of them are RETRIEVED by a ready embedding.

    One in six is watched (of the slow ones every other), one in twenty repeated, one in fifty cancelled, one in a
    hundred has a time to live of a few seconds; half of the slow ones are BEST_EFFORT.
    """
    if verified + estimated + by_image > jobs:
        raise ValueError("more slow jobs than jobs")
    rng = random.Random(seed)
    kinds = [(Tier.VERIFIED, False)] * verified + [(Tier.ESTIMATED, False)] * estimated
    kinds += [(Tier.RETRIEVED, False)] * by_image
    kinds += [(Tier.RETRIEVED, True)] * (jobs - len(kinds))
    rng.shuffle(kinds)
    projects = rng.choices([name for name, _ in PROJECTS], [share for _, share in PROJECTS], k=jobs)
    asks: list[Ask] = []
    for number, ((tier, by_embedding), project) in enumerate(zip(kinds, projects, strict=True)):
        slow = tier is not Tier.RETRIEVED
        asks.append(
            Ask(
                request=str(uuid.UUID(int=number + 1)), project=project, tier=tier, by_embedding=by_embedding,
                query=rng.randrange(1 << 16), best_effort=slow and rng.random() < 0.5,
                waits=not slow and rng.random() < 0.3, repeated=rng.random() < 0.05,
                cancelled_after_s=rng.uniform(0, 3) if rng.random() < 0.02 else None,
                ttl_s=rng.uniform(2, 10) if rng.random() < 0.01 else None,
                watched=number % (SLOW_WATCHED_EVERY if slow else WATCHED_EVERY) == 0,
            )  # fmt: skip
        )
    return asks
