"""What a chaos run asks follows from its seed and has the mix that was ordered."""

from __future__ import annotations

from collections import Counter

import pytest

from byline.chaos.plan import PROJECTS, plan
from byline.jobs.states import Tier


def test_the_same_seed_asks_the_same_and_another_seed_something_else() -> None:
    asks = plan(300, 1, verified=6, estimated=6, by_image=6)
    assert asks == plan(300, 1, verified=6, estimated=6, by_image=6)
    assert asks != plan(300, 2, verified=6, estimated=6, by_image=6)


def test_the_mix_is_as_ordered_and_every_project_asks() -> None:
    asks = plan(2000, 3, verified=40, estimated=30, by_image=20)
    kinds = Counter((ask.tier, ask.by_embedding) for ask in asks)
    assert kinds == {
        (Tier.VERIFIED, False): 40, (Tier.ESTIMATED, False): 30, (Tier.RETRIEVED, False): 20,
        (Tier.RETRIEVED, True): 1910,
    }  # fmt: skip
    assert len({ask.request for ask in asks}) == 2000
    assert {ask.project for ask in asks} == {name for name, _ in PROJECTS}
    for trait in ("repeated", "waits", "cancelled_after_s", "ttl_s", "watched"):
        assert any(getattr(ask, trait) for ask in asks), trait


def test_more_slow_jobs_than_jobs_are_refused() -> None:
    with pytest.raises(ValueError, match="more slow jobs"):
        plan(5, 1, verified=3, estimated=3, by_image=0)
