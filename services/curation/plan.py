"""Which prompts become queries, in which split, with which candidates: pure functions of their arguments.

Why it exists: labels are only comparable, and splits only clean, if the plan is the same whoever
makes it and whenever: the live service and the script behind the demo's snapshot call this.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from byline.catalog.items import Item

#: Shares of the splits, in the order they claim the unit interval.
SPLITS = (("train", 0.70), ("validation", 0.12), ("test", 0.18))
_NOTHING_STORED: Mapping[str, Collection[str]] = MappingProxyType({})
#: Added to the sampling seed of a query drawn by chance: none that is chosen is ever the same query.
_DRAWN_SEEDS = 1 << 50


@dataclass(frozen=True)
class PlannedQuery:
    """A prompt to generate from: its seed, the group it must not leak across, and its split.

    ``source``: corpus, file or live. A live one has a picture already, ``image_sha256``, and the job it came from.
    ``chosen_for`` says why it was taken (``byline.db.curation_models.PURPOSES``), once it was.
    """

    prompt: str
    seed: int
    near_duplicate_group: int
    split: str
    source: str = "corpus"
    image_sha256: str | None = None
    asked_by: uuid.UUID | None = None
    #: The release that answered the live query; None: the one active when its candidates are chosen.
    release_id: str | None = None
    chosen_for: str = "uniform"


def split_of(near_duplicate_group: int) -> str:
    """The split of a group's name, by hash."""
    digest = hashlib.blake2b(f"split/{near_duplicate_group}".encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    for name, share in SPLITS:
        if place < share:
            return name
        place -= share
    return SPLITS[-1][0]


def normalised(prompt: str) -> str:
    """Case, punctuation and spaces do not make another prompt."""
    return " ".join(re.sub(r"[\W_]+", " ", prompt.casefold()).split())


def prompt_groups(items: Sequence[Item]) -> dict[str, int]:
    """Each caption's group: items that share a caption or a near-duplicate group are in one.

    The smallest group id of the connected captions names it, so two recolours with different
    captions, or two pictures under one caption, can never be on both sides of a split.
    """
    parent: dict[str, str] = {}

    def find(node: str) -> str:
        while parent.setdefault(node, node) != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for item in items:
        parent[find(f"caption/{item.caption}")] = find(f"group/{item.near_duplicate_group}")
    smallest: dict[str, int] = {}
    for item in items:
        root = find(f"caption/{item.caption}")
        smallest[root] = min(item.near_duplicate_group, smallest.get(root, item.near_duplicate_group))
    return {item.caption: smallest[find(f"caption/{item.caption}")] for item in items}


def group_splits(groups: Mapping[str, int], stored: Mapping[str, Collection[str]]) -> dict[int, str | None]:
    """The split of each of the ``groups`` (by caption): the one its words have in ``stored`` (splits by prompt), by
    hash if they have none yet.

    Groups with captions of the same words share theirs. They stay two groups: the order of a plan and its sampling
    seeds hang on the groups, and a snapshot made from a plan must be found in it again. None if the stored ones
    disagree (an item that came later tied two groups together): whichever side a new query took, it would leak from
    the other.
    """
    tied: dict[int, int] = {}

    def find(group: int) -> int:
        while (above := tied.setdefault(group, group)) != group:
            tied[group] = tied[above]
            group = tied[group]
        return group

    words = {caption: normalised(caption) for caption in groups}
    first: dict[str, int] = {}
    for caption, group in groups.items():
        one, other = find(group), find(first.setdefault(words[caption], group))
        tied[max(one, other)] = min(one, other)
    known: dict[str, set[str]] = {}
    for prompt, splits in stored.items():
        known.setdefault(normalised(prompt), set()).update(splits)
    found: dict[int, set[str]] = {}
    for caption, group in groups.items():
        found.setdefault(find(group), set()).update(known.get(words[caption], ()))
    return {group: _agreed(found[find(group)], find(group)) for group in set(groups.values())}


def _agreed(stored: Collection[str], group: int) -> str | None:
    if len(stored) > 1:
        return None
    return next(iter(stored)) if stored else split_of(group)


def plan_queries(
    items: Sequence[Item],
    seed: int,
    stored: Mapping[str, Collection[str]] = _NOTHING_STORED,
    withdrawn: Collection[int] = frozenset(),
) -> Iterator[PlannedQuery]:
    """An endless, reproducible sequence of queries from corpus captions; empty if no caption may be used.

    Every round visits each prompt group once in an order given by ``seed``, with a caption of that
    group and a sampling seed of its own: more groups before more captions, since queries of one
    group teach the head the same thing.

    ``items`` are all items ever, those ``withdrawn`` (ids) too: they still tie captions together, but a
    caption of none but withdrawn items is passed over. ``stored`` gives the splits in which queries of a
    prompt are already, whoever asked them: a group keeps its split when its name changes because items came or went.
    """
    of_caption = prompt_groups(items)
    groups: dict[int, list[str]] = {}
    for caption, group in sorted(of_caption.items()):
        groups.setdefault(group, []).append(caption)
    splits = group_splits(of_caption, stored)
    usable = {item.caption for item in items if item.item_id not in withdrawn}
    if not any(splits[group] and usable.intersection(captions) for group, captions in groups.items()):
        return
    number = 0
    for round_ in range(1_000_000):
        order = np.random.default_rng([seed, round_]).permutation(sorted(groups))
        for group in order.tolist():
            caption, split = groups[group][round_ % len(groups[group])], splits[group]
            if split is not None and caption in usable:
                yield PlannedQuery(caption, seed * 1_000_000 + number, group, split)
            # Counted when passed over, too: the seeds of the others stay as they are.
            number += 1


def by_chance(plan: Iterable[PlannedQuery]) -> Iterator[PlannedQuery]:
    """The queries of a plan as those that chance alone draws, each with a sampling seed of its own.

    A plan's order is random and knows neither labels nor figures, and each round visits every group once: whatever is
    labelled already or chosen beside it, the first so many of it stand for all, and their plain mean has no bias. The
    plan must have another order than the one that is chosen from, or its first groups would be the best taught ones.
    """
    for planned in plan:
        yield replace(planned, seed=planned.seed + _DRAWN_SEEDS, chosen_for="uniform")
