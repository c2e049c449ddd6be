"""The uniform share stands for all queries, whatever is chosen beside it and labelled already."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import cast

import numpy as np

from byline.catalog.items import Item
from byline.rankings.controls import CurationControl
from services.curation.chooser import Chooser, Labelled
from services.curation.loop import LIVE_SPLITS, Curator
from services.curation.plan import PlannedQuery, by_chance, plan_queries, split_of
from services.curation.produce import Producer

GROUPS, POOL, BATCH, TICKS = 160, 24, 4, 24
ITEMS = [Item(number, f"thing {number}", near_duplicate_group=number) for number in range(GROUPS)]
GROUP_OF = {item.caption: item.near_duplicate_group for item in ITEMS}
SHARE = 0.25


class Producing:
    """Every query that is asked for is labelled at once."""

    def __init__(self) -> None:
        self.made: list[PlannedQuery] = []

    def known(self) -> frozenset[tuple[str, int]]:
        return frozenset((one.prompt, one.seed) for one in self.made)

    def failed(self) -> frozenset[tuple[str, int]]:
        return frozenset()

    def produce(self, batch: Sequence[PlannedQuery]) -> uuid.UUID:
        self.made += batch
        return uuid.uuid4()


def figure(group: int) -> float:
    """What is measured of a query: of an unusual prompt more."""
    return 3.0 if group % 2 else 1.0


def features(prompts: Sequence[str]) -> np.ndarray:
    """Usual prompts are all alike, each unusual one is like no other."""
    rows = np.zeros((len(prompts), GROUPS), dtype=np.float32)
    for row, prompt in enumerate(prompts):
        group = GROUP_OF.get(prompt, 0)
        rows[row, group if group % 2 else 0] = 1.0
    return rows


def life(seed: int) -> list[PlannedQuery]:
    """All that is asked for in some ticks of the loop with the service's chooser."""
    producing = Producing()
    asked = lambda: Labelled(tuple(dict.fromkeys(one.prompt for one in producing.made)), {})  # noqa: E731
    curator = Curator(
        cast(Producer, producing), lambda: plan_queries(ITEMS, seed), lambda: 0, lambda: 0, target_open=1,
        max_rankings=10_000, batch=BATCH, pool=POOL, choose=Chooser(features, asked, lambda: len(producing.made), seed),
        by_chance=lambda: by_chance(plan_queries(ITEMS, seed + 1)),
        control=lambda: CurationControl(uniform_share=SHARE),
    )  # fmt: skip
    for _ in range(TICKS):
        assert curator.tick()
    return producing.made


def test_the_mean_over_the_uniform_share_is_right_while_choosing_uses_up_the_pool() -> None:
    truth = np.mean([figure(group) for group in range(GROUPS) if split_of(group) in LIVE_SPLITS])
    means, chosen = [], []
    for seed in range(0, 32, 2):
        made = life(seed)
        values = {reason: [figure(one.near_duplicate_group) for one in made if (one.chosen_for == "uniform") == reason]
                  for reason in (True, False)}  # fmt: skip
        assert len(values[True]) == SHARE * BATCH * TICKS
        means.append(np.mean(values[True]))
        chosen.append(np.mean(values[False]))
    error = float(np.std(means) / np.sqrt(len(means)))
    assert error < 0.05 * truth  # else the next line shows nothing
    assert abs(np.mean(means) - truth) < 3 * error
    assert np.mean(chosen) > truth + 5 * error  # what was chosen is unusual, as it should be


def test_no_query_that_is_chosen_is_ever_drawn_by_chance() -> None:
    made = life(0)
    assert len({(one.prompt, one.seed) for one in made}) == len(made)
