"""Which prompts become queries, in which split, with which candidates: pure functions of their arguments.

Why it exists: labels are only comparable, and splits only clean, if the plan is the same whoever
makes it and whenever: the live service and the script behind the demo's snapshot call this.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from byline.catalog.items import Item

#: Shares of the splits, in the order they claim the unit interval.
SPLITS = (("train", 0.70), ("validation", 0.12), ("test", 0.18))


@dataclass(frozen=True)
class PlannedQuery:
    """A prompt to generate from: its seed, the group it must not leak across, and its split."""

    prompt: str
    seed: int
    near_duplicate_group: int
    split: str


def split_of(near_duplicate_group: int) -> str:
    """The split of a group, by hash: a group never moves, whatever else is added."""
    digest = hashlib.blake2b(f"split/{near_duplicate_group}".encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    for name, share in SPLITS:
        if place < share:
            return name
        place -= share
    return SPLITS[-1][0]


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


def plan_queries(items: Sequence[Item], seed: int) -> Iterator[PlannedQuery]:
    """An endless, reproducible sequence of queries from corpus captions.

    Every round visits each prompt group once in an order given by ``seed``, with a caption of that
    group and a sampling seed of its own: more groups before more captions, since queries of one
    group teach the head the same thing.
    """
    groups: dict[int, list[str]] = {}
    for caption, group in sorted(prompt_groups(items).items()):
        groups.setdefault(group, []).append(caption)
    number = 0
    for round_ in range(1_000_000):
        order = np.random.default_rng([seed, round_]).permutation(sorted(groups))
        for group in order.tolist():
            captions = groups[group]
            yield PlannedQuery(captions[round_ % len(captions)], seed * 1_000_000 + number, group, split_of(group))
            number += 1


def choose_candidates(
    query_features: NDArray[np.float32],
    item_ids: NDArray[np.int64],
    item_features: NDArray[np.float32],
    *,
    count: int,
    explore_share: float,
    seed: int,
) -> NDArray[np.int64]:
    """Ids to rank: the nearest by raw features, plus a random share from *outside* the nearest.

    ``query_features`` [d], ``item_features`` [n, d]. The random share (``explore_share`` of
    ``count``) gives an unbiased estimate of what the pruning misses. Standardised per dimension
    first: otherwise one block of features decides alone. Ties by item id.
    """
    if count >= len(item_ids):
        return np.sort(item_ids)
    mean, deviation = item_features.mean(0), item_features.std(0) + 1e-6
    items = (item_features - mean) / deviation
    query = (query_features - mean) / deviation
    cosine = items @ query / (np.linalg.norm(items, axis=1) * np.linalg.norm(query) + 1e-9)
    order = np.lexsort((item_ids, -cosine))
    explored = min(round(count * explore_share), len(item_ids) - count)
    nearest, rest = order[: count - explored], order[count - explored :]
    random = np.random.default_rng(seed).choice(rest, size=explored, replace=False)
    return np.sort(item_ids[np.concatenate([nearest, random])])
