"""One year of one arm: each week traffic, drift, labels, and perhaps a refresh with its release.

Why it exists: the order of these steps is the loop. Everything that decides is called (``pieces``), everything that
is given is asked of the world; nothing here looks at live prompts but to report on them and to measure drift as the
service does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from byline.drift.windows import Measured, falls
from byline.errors import LabelsNotUsable
from byline.evaluation.map import MapResult, mean_average_precision
from byline.evaluation.study_data import JUDGE
from byline.ranker.head import Head
from byline.simulation.heads import HeadMaker, Label, LiveView, labels_digest
from byline.simulation.pieces import Decision, Pieces, Seen
from byline.simulation.settings import ACTIVE, RECENT
from byline.simulation.shelf import Shelf
from byline.simulation.world import GATE, POOL, VALIDATION, World

Row = dict[str, Any]
#: With at least this many ranked test queries the gate judges on them, as in the trainer.
MINIMUM_TEST_QUERIES = 10


@dataclass(frozen=True)
class ActiveHead:
    """What answers now."""

    release_id: str
    head: Head
    slope: float
    week: int
    labels_digest: str


@dataclass
class _State:
    train: list[Label] = field(default_factory=list)
    validation: list[Label] = field(default_factory=list)
    gate: list[Label] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)
    active: ActiveHead | None = None
    last: tuple[int, datetime] | None = None
    #: Drift as the service sees it, since the last alarm was dealt with.
    seen: list[Measured] = field(default_factory=list)
    alarm: tuple[datetime, str] | None = None
    frozen: Head | None = None
    releases: list[Row] = field(default_factory=list)
    views: dict[tuple[int, bytes], LiveView] = field(default_factory=dict)

    @property
    def rankings(self) -> int:
        return len(self.train) + len(self.validation)


class Year:
    """One arm in one world. ``root`` takes its releases."""

    def __init__(self, world: World, maker: HeadMaker, pieces: Pieces, arm: str, root: Path, git_sha: str = "") -> None:
        self.world = world
        self.maker = maker
        self.pieces = pieces
        self.arm = arm
        self.shelf = Shelf(root, world, maker, git_sha)
        self._state = _State()
        self._choices = np.random.default_rng([world.seed, 4])
        self._held_out = np.random.default_rng([world.seed, 5])

    def run(self, progress: Callable[[int, int], None] = lambda done, total: None) -> Row:
        """All weeks: rows of ``weeks``, of ``releases``, and what the world was."""
        settings, weeks = self.world.settings, []
        self._start()
        for week in range(settings.weeks):
            progress(week, settings.weeks)
            if week == settings.shift_week and self._state.active is not None:
                self._state.frozen = self._state.active.head
            if week:
                self._curate(week)
            fell = self._look_for_drift(week)
            decision = self._decide(week)
            if decision.triggers:
                self._refresh(week, decision)
            weeks.append(self._report(week, fell))
        return {"arm": self.arm, "weeks": weeks, "releases": self._state.releases, "world": self.world.facts(),
                "reasons": self._state.reasons, "full": self._full()}  # fmt: skip

    # -- labels -----------------------------------------------------------------------------------

    def _start(self) -> None:
        """The first labels, alike in all arms: uniform, of what clients ask on the first day."""
        settings, state = self.world.settings, self._state
        for role, into, count in ((POOL, state.train, settings.start_train), (VALIDATION, state.validation,
                                  settings.start_validation), (GATE, state.gate, settings.start_gate)):  # fmt: skip
            rows = self._held_out.permutation(self.world.waiting(0, role))[:count]
            into += [Label(int(row), 0) for row in rows]
        state.reasons["start"] = len(state.train)

    def _curate(self, week: int) -> None:
        settings, state = self.world.settings, self._state
        for number in range(settings.held_out_per_week):
            # Drawn as traffic asks, whatever the arm: held-out estimates must not depend on the planner.
            first, into = (VALIDATION, state.validation), (GATE, state.gate)
            role, labels = first if (week + number) % 2 else into
            known = {label.row for label in labels}
            topic = int(self._held_out.random() < settings.traffic(week)[1])
            left = [row for row in self.world.waiting(week, role).tolist() if row not in known]
            mine = [row for row in left if self.world.topics[row] == topic] or left
            if mine:
                labels.append(Label(int(self._held_out.choice(mine)), week))
        known = {label.row for label in state.train}
        for row, reason in self._chosen(week, known):
            state.train.append(Label(row, week))
            state.reasons[reason] = state.reasons.get(reason, 0) + 1

    def _chosen(self, week: int, known: set[int]) -> list[tuple[int, str]]:
        settings, world, state = self.world.settings, self.world, self._state
        waiting = world.asked_lately(week, POOL) if self.arm == RECENT else world.waiting(week, POOL)
        left = np.asarray([row for row in waiting.tolist() if row not in known], dtype=np.int64)
        if not len(left):
            left = np.asarray([row for row in world.waiting(week, POOL).tolist() if row not in known], dtype=np.int64)
        count = min(settings.train_per_week, len(left))
        if self.arm != ACTIVE:
            return [(int(row), "random") for row in self._choices.permutation(left)[:count]]
        head = state.active.head if state.active else None
        disputed = self.maker.disagreement(head, left, week) if head is not None else None
        labelled = np.asarray([label.row for label in state.train], dtype=np.int64)
        found = self.pieces.choose(world.prompts[left], world.prompts[labelled], disputed, world.corpus.groups[left],
                                   count, settings.uniform_share, self._choices)
        return [(int(left[index]), reason) for index, reason in found]

    # -- drift ------------------------------------------------------------------------------------

    def _look_for_drift(self, week: int) -> str:
        """Shadow lookups of the week; the alarm, if one is raised now."""
        state, now = self._state, self.world.settings.day(week)
        if state.active is None:
            return ""
        view = self._view(state.active, week)
        release = state.active.release_id
        state.seen += [Measured(now, int(self.world.topics[row]), release, view.overlap[row], math.nan, math.nan)
                       for row in self.world.shadows(week).tolist()]  # fmt: skip
        if state.alarm is not None:
            return ""
        found = falls(state.seen, now, self.world.settings.drift)
        if not found:
            return ""
        fall = found[0]
        where = "all queries" if fall.cluster is None else f"cluster {fall.cluster}"
        text = f"overlap of {where} fell from {fall.before.value:.3f} to {fall.now.value:.3f}"
        state.alarm = (now, text)
        return text

    # -- refresh ----------------------------------------------------------------------------------

    def _decide(self, week: int) -> Decision:
        settings, world, state = self.world.settings, self.world, self._state
        added = withdrawn = 0
        changed: datetime | None = None
        digest = labels_digest(world.corpus, state.train, state.validation)
        if state.active is not None:
            then, now = world.present(state.active.week), world.present(week)
            added, withdrawn = int((now & ~then).sum()), int((then & ~now).sum())
            # Items came or went in the middle of the week, and have been still since.
            event = max((w for w in (settings.join_week, settings.withdraw_week) if w <= week), default=None)
            changed = settings.day(event) - timedelta(days=3) if event is not None and (added or withdrawn) else None
        seen = Seen(state.rankings, added, withdrawn, changed, state.alarm)
        labels_changed = state.active is None or state.active.labels_digest != digest
        return self.pieces.due(seen, state.last, settings.day(week), labels_changed)

    def _refresh(self, week: int, decision: Decision) -> None:
        world, state, maker = self.world, self._state, self.maker
        active, seed = state.active, world.seed * 1000 + week
        previous = (active.head, active.slope) if active else None
        fitted = maker.fit(state.train, state.validation, week, seed, previous, decision.learn)
        held = state.gate if len(state.gate) >= MINIMUM_TEST_QUERIES else state.validation
        labelled, cutoff = maker.labelled(held, JUDGE, week), world.settings.cutoff
        scores = fitted.report.head.scores(labelled.query_features, labelled.item_features)
        candidate = mean_average_precision(scores, labelled.tau, cutoff)
        before: MapResult | None = None
        if active is not None:
            theirs = active.head.scores(labelled.query_features, labelled.item_features)
            before = mean_average_precision(theirs, labelled.tau, cutoff)
        verdict = self.pieces.gate(scores, labelled.tau, candidate, before, fitted.report.slope, seed)
        parent = active.release_id if active else None
        metrics: Row = {
            "triggers": list(decision.triggers), "fit": {"start": fitted.start, "validation_map": fitted.validation,
                                                         "best_step": fitted.report.best_step},
            "gate": {**{name: value if math.isfinite(value) else None for name, value in verdict.metrics.items()},
                     "passed": verdict.passed, "reasons": list(verdict.reasons)},
            "labels": {"train": len(state.train), "validation": len(state.validation), "gate": len(state.gate)},
            "curation": {"arm": self.arm, "chosen_for": dict(state.reasons)},
            "corpus": {"items": labelled.items, "week": week},
        }  # fmt: skip
        manifest = self.shelf.build(fitted.report.head, state.train, state.validation, week, parent, metrics)
        unexplained = self.shelf.unexplained(manifest.release_id, parent, state.train, state.validation, week)
        state.releases.append({
            "week": week, "release_id": manifest.release_id, "parent": parent, "accepted": verdict.passed,
            "items": manifest.items, "labels": manifest.labels.queries, "labels_digest": manifest.labels.digest,
            "manifest_digest": manifest.digest, "metrics": manifest.metrics, "unexplained": unexplained,
        })  # fmt: skip
        state.last = (state.rankings, world.settings.day(week))
        if verdict.passed:
            state.active = ActiveHead(manifest.release_id, fitted.report.head, fitted.report.slope, week,
                                      manifest.labels.digest)
            if state.alarm is not None:
                state.alarm, state.seen = None, []

    # -- reporting --------------------------------------------------------------------------------

    def _view(self, active: ActiveHead, week: int) -> LiveView:
        key = (active.week, self.world.present(week).tobytes())
        if key not in self._state.views:
            self._state.views[key] = self.maker.live(active.head, week)
        return self._state.views[key]

    def _report(self, week: int, alarm: str) -> Row:
        state, world = self._state, self.world
        if state.active is None:
            raise LabelsNotUsable("no release after the first week: the first labels are too few for the schedule, or "
                                  "the gate refused the first head; begin the year with more labels")
        view = self._view(state.active, week)
        by_topic = LiveView.by_topic(world, view.precision)
        sampled = [view.overlap[row] for row in world.shadows(week).tolist()]
        row: Row = {
            "week": week, "train": len(state.train), "labels": state.rankings + len(state.gate),
            "map": view.traffic_map(world, week), "map_first": by_topic[0], "map_second": by_topic[1],
            "overlap": float(np.mean(sampled)), "alarm": alarm, "alarm_open": state.alarm is not None,
            "second_share": float(np.mean(world.topics[[label.row for label in state.train]])),
            "release": state.active.release_id,
        }  # fmt: skip
        if week >= world.settings.join_week:
            found = [value for value in view.newcomers.values() if not math.isnan(value)]
            row["newcomers_found"] = float(np.mean(found)) if found else None
        if state.frozen is not None:
            frozen = ActiveHead("frozen", state.frozen, 1.0, -1, "")
            row["frozen_map"] = self._view(frozen, week).traffic_map(world, week)
        return row

    def _full(self) -> Row:
        """For comparison: a head of every query of the pool and every held-out one, judged on the last week."""
        world, last = self.world, self.world.settings.weeks - 1
        rows = {role: np.concatenate([world.rows(role, topic) for topic in (0, 1)]) for role in (POOL, VALIDATION)}
        labels = {role: [Label(int(row), last) for row in found] for role, found in rows.items()}
        fitted = self.maker.fit(labels[POOL], labels[VALIDATION], last, world.seed * 1000 + 999, None, True)
        view = self.maker.live(fitted.report.head, last)
        first, second = LiveView.by_topic(world, view.precision)
        return {"train": len(rows[POOL]), "map": view.traffic_map(world, last), "map_first": first,
                "map_second": second}  # fmt: skip
