"""What the loop lives in: two topics of prompts, queries in four roles, artists who join and artists who leave.

Why it exists: arms can be compared only in the same world. A world is a function of data, settings and seed; nothing
in it depends on what an arm does. The teacher is the label file: its rankings were measured before, and are told when
somebody asks for a label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from byline.catalog.items import Item
from byline.errors import LabelsNotUsable
from byline.evaluation.study_data import StudyData
from byline.simulation.settings import YearSettings

IntArray = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
POOL, VALIDATION, GATE, LIVE = "pool", "validation", "gate", "live"
#: The encoder whose rows say what a prompt is about.
TEXT = "minilm"


@dataclass(frozen=True)
class Corpus:
    """Labelled queries over a corpus; ``catalogue`` in the order of the data's items, ``groups`` [q] of queries."""

    data: StudyData
    catalogue: Sequence[Item]
    groups: IntArray


@dataclass(frozen=True)
class World:
    """One seed's world."""

    corpus: Corpus
    settings: YearSettings
    seed: int

    @cached_property
    def prompts(self) -> npt.NDArray[np.float32]:
        """[q, d]: features of the prompts' texts."""
        data = self.corpus.data
        return data.query_features[:, data.columns((TEXT,))]

    @cached_property
    def topics(self) -> IntArray:
        """[q]: 0 or 1, halves of the prompts along the main direction of their texts; 0, the narrower, comes first."""
        rows = self.prompts / (np.linalg.norm(self.prompts, axis=1, keepdims=True) + 1e-9)
        along = np.linalg.svd(rows - rows.mean(0), full_matrices=False)[0][:, 0]
        upper = along > np.median(along)
        narrower = np.linalg.norm(rows[upper].mean(0)) > np.linalg.norm(rows[~upper].mean(0))
        return np.where(upper == narrower, 0, 1).astype(np.int64)

    @cached_property
    def _roles(self) -> dict[str, IntArray]:
        """Queries by role; queries of one near-duplicate group have one role."""
        groups, settings = self.corpus.groups, self.settings
        rng = np.random.default_rng([self.seed, 0])
        role_of: dict[int, str] = {}
        for topic in (0, 1):
            mine = [g for g in rng.permutation(np.unique(groups[self.topics == topic])).tolist() if g not in role_of]
            live, held = round(settings.live_share * len(mine)), round(settings.held_out_share * len(mine))
            for place, group in enumerate(mine):
                role_of[group] = (LIVE if place < live else VALIDATION if place < live + held
                                  else GATE if place < live + 2 * held else POOL)  # fmt: skip
        roles = np.asarray([role_of[group] for group in groups.tolist()])
        return {role: np.flatnonzero(roles == role).astype(np.int64) for role in (POOL, VALIDATION, GATE, LIVE)}

    def rows(self, role: str, topic: int) -> IntArray:
        """Queries of a role and topic, in a seeded order. LabelsNotUsable if there are none."""
        found = self._roles[role]
        found = found[self.topics[found] == topic]
        if not len(found):
            raise LabelsNotUsable(f"no {role} queries of topic {topic}; the year needs more labelled queries")
        order = np.random.default_rng([self.seed, 1, topic]).permutation(len(found))
        return np.asarray(found[order], dtype=np.int64)

    def waiting(self, week: int, role: str) -> IntArray:
        """Queries that clients have asked by ``week`` and opted in: all of the first topic and the few of the second
        that traffic brings; all of the second after the shift."""
        later = self.rows(role, 1)
        few = round((1 - self.settings.leaning) * len(later))
        return np.concatenate([self.rows(role, 0), later if week >= self.settings.shift_week else later[:few]])

    def asked_lately(self, week: int, role: str) -> IntArray:
        """The part of ``waiting`` that is of the half-year's topic."""
        found = self.waiting(week, role)
        lately = self.topics[found] == int(week >= self.settings.shift_week)
        return np.asarray(found[lately], dtype=np.int64)

    # -- artists ----------------------------------------------------------------------------------

    @cached_property
    def _artists(self) -> tuple[set[str], set[str]]:
        """Those who join, those who leave; nobody does both."""
        names = sorted({item.creator for item in self.corpus.catalogue})
        order = np.random.default_rng([self.seed, 2]).permutation(names).tolist()
        joining = round(self.settings.new_artists * len(names))
        leaving = round(self.settings.withdrawn_artists * len(names))
        return set(order[:joining]), set(order[joining : joining + leaving])

    def _items_of(self, artists: set[str]) -> Mask:
        return np.asarray([item.creator in artists for item in self.corpus.catalogue])

    @cached_property
    def joining(self) -> Mask:
        """[n]: items of the artists who join."""
        return self._items_of(self._artists[0])

    @cached_property
    def leaving(self) -> Mask:
        """[n]: items of the artists who leave."""
        return self._items_of(self._artists[1])

    def present(self, week: int) -> Mask:
        """[n]: items in the corpus in a week."""
        absent = np.zeros(len(self.corpus.catalogue), dtype=bool)
        if week < self.settings.join_week:
            absent |= self.joining
        if week >= self.settings.withdraw_week:
            absent |= self.leaving
        return ~absent

    def shadows(self, week: int) -> IntArray:
        """Live queries of a week that the teacher ranks as well, drawn by the traffic's shares; alike in every arm."""
        rng = np.random.default_rng([self.seed, 3, week])
        topics = (rng.random(self.settings.shadows) < self.settings.traffic(week)[1]).astype(int)
        return np.asarray([rng.choice(self.rows(LIVE, topic)) for topic in topics], dtype=np.int64)

    def facts(self) -> dict[str, object]:
        """What the world is, for the result file."""
        joining, leaving = self._artists
        counts = {role: [len(self.rows(role, t)) for t in (0, 1)] for role in (POOL, VALIDATION, GATE, LIVE)}
        return {"seed": self.seed, "queries": counts, "artists_joining": len(joining), "artists_leaving": len(leaving),
                "items_joining": int(self.joining.sum()), "items_leaving": int(self.leaving.sum()),
                "items": len(self.corpus.catalogue)}  # fmt: skip
