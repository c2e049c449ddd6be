"""The sketch teacher: near the first-order ranking of a whole corpus for one gradient of the query.

Why it exists: the first-order form needs a pass over the candidates; with their whitened gradients kept as short
vectors (``sketch_set``) a new query costs its own gradient, about a second, and an inner product per item
(reference/measured.md C5). The answer approximates the teacher whose gradients were sketched; it verifies nothing about
that teacher itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Self

import numpy as np
from numpy.typing import NDArray

from byline.diffusion.model import DiffusionModel
from byline.teachers.first_order import AbuPlusLinear
from byline.teachers.item_gradients import GradientBlock
from byline.teachers.natural_gradient import NaturalGradientTeacher, query_blocks
from byline.teachers.preconditioner import Preconditioner
from byline.teachers.ranking import (
    Check,
    Progress,
    Ranking,
    ScoresManyAtOnce,
    TeacherItem,
    TeacherQuery,
    ignore_progress,
    never_cancelled,
    summarise,
)
from byline.teachers.sketch_basis import SketchBasis
from byline.teachers.sketch_fit import whitened_items
from byline.teachers.sketch_set import SketchSet
from byline.teachers.token_gradients import TokenBasis, TokenGradients, stacked_deltas


@dataclass(frozen=True)
class AskedQuery:
    """A query where its corpus lies: ``sketch`` float32 [replicates, d], and ``directions`` [replicates, r, columns]
    to meet token gradients with, None where there are none. Replicates share no noise; their mean is the query's."""

    sketch: NDArray[np.float32]
    directions: NDArray[np.float32] | None


class SketchTeacher(ScoresManyAtOnce, NaturalGradientTeacher):
    """Scores by sketches in ``basis``: tau = < sketch of the query, sketch of the item > / N.

    With token gradients (``token_basis``, or those of ``known``) tau is theirs, which is the first-order score
    but for rounding; the sketches then serve to make a shortlist. Settings are those the basis was fitted
    under, but for ``query_draws``, which buys accuracy with time. ``known`` holds what is ready of items; that of
    other items is computed, and kept in memory. The standard error, and the two halves, are those of the
    query's draws: an item's own noise is in its sketch, once.
    """

    method = "sketch"

    def __init__(
        self,
        model: DiffusionModel,
        curvature: Preconditioner,
        basis: SketchBasis,
        known: SketchSet | None = None,
        *,
        token_basis: TokenBasis | None = None,
        query_draws: int | None = None,
        batch: int = 128,
    ) -> None:
        """Raises TeacherNotUsable when basis, curvature and model do not belong together."""
        basis.require(curvature)
        settings = basis.settings if query_draws is None else replace(basis.settings, query_draws=query_draws)
        super().__init__(model, curvature, settings, batch)
        self.basis = basis
        self.token_basis = known.tokens.basis if known is not None and known.tokens is not None else token_basis
        self._linear = AbuPlusLinear(model, curvature, settings, batch)
        empty = np.empty((0, basis.dimensions), dtype=np.float32)
        self._known = known or SketchSet(basis, np.empty(0, dtype=np.int64), empty, {}, "")

    @property
    def teacher_id(self) -> str:
        """See ``Teacher``."""
        tokens = "" if self.token_basis is None else f"/tokens-{self.token_basis.rank}"
        return f"{super().teacher_id}/{self.basis.name}{tokens}"

    def resized(self, corpus_size: int) -> Self:
        """Itself: its corpus is the one that was sketched."""
        return self

    def fit(
        self,
        corpus: Sequence[TeacherItem],
        *,
        progress: Progress = ignore_progress,
        check: Check = never_cancelled,
    ) -> None:
        """Sketch the items that have none yet; the basis stays as it is."""
        self._complete(corpus, progress, check)

    def ask(self, query: TeacherQuery, *, check: Check = never_cancelled) -> AskedQuery:
        """One query's gradient, ready to meet the corpus; the one slow step of an estimate."""
        [asked] = self._ask([query], check)
        return asked

    def query_sketches(self, queries: Sequence[TeacherQuery], *, check: Check = never_cancelled) -> NDArray[np.float32]:
        """Sketches [q, replicates, d], one per replicate of a query's draws; their mean is the query's sketch."""
        return np.stack([asked.sketch for asked in self._ask(queries, check)])

    def query_sketch(self, query: TeacherQuery, *, check: Check = never_cancelled) -> NDArray[np.float32]:
        """Sketches [replicates, d] of one query; see ``query_sketches``."""
        return self.ask(query, check=check).sketch

    def item_sketches(
        self,
        items: Sequence[TeacherItem],
        *,
        progress: Progress = ignore_progress,
        check: Check = never_cancelled,
    ) -> NDArray[np.float32]:
        """Sketches [n, d] of ``items`` from their own gradients, as new items need them."""
        return self.sketched(items, progress=progress, check=check).sketches

    def sketched(
        self,
        items: Sequence[TeacherItem],
        *,
        progress: Progress = ignore_progress,
        check: Check = never_cancelled,
    ) -> SketchSet:
        """Everything kept of ``items``, sketches and token gradients, from one pass over their own gradients."""
        found = np.empty((len(items), self.basis.dimensions), dtype=np.float32)
        parts: list[TokenGradients] = []
        ids = np.array([item.item_id for item in items], dtype=np.int64)

        def keep(place: slice, blocks: Sequence[GradientBlock]) -> None:
            if self.token_basis is not None:
                captions = [item.caption for item in items[place]]
                parts.append(
                    TokenGradients.encode(
                        self.token_basis,
                        ids[place],
                        stacked_deltas(blocks),
                        captions,
                        self.model.encode_prompts,
                    )
                )

        for place, whitened in whitened_items(self._linear, items, progress, check, keep):
            found[place] = self.basis.project(whitened)
        tokens = reduce(TokenGradients.joined, parts) if parts else None
        return SketchSet(self.basis, ids, found, {}, self.teacher_id, tokens)

    def score_many(
        self,
        queries: Sequence[TeacherQuery],
        candidates: Sequence[TeacherItem],
        *,
        candidate_set: str = "given",
        progress: Progress = ignore_progress,
        check: Check = never_cancelled,
    ) -> list[Ranking]:
        """tau of every candidate for every query: a gradient per query, a product for all."""
        self._complete(candidates, progress, check)
        ids = np.array([item.item_id for item in candidates], dtype=np.int64)
        rows = self._known.rows_of(ids.tolist())
        draws = self.settings.item_draws
        samples = np.full(len(ids), draws * (1 if self.settings.flips == "none" else 2), dtype=np.int32)
        rankings = []
        for asked in self._ask(queries, check):
            if self._known.tokens is not None and asked.directions is not None:
                scores = self._known.tokens.scores(asked.directions, rows).astype(np.float64)
            else:
                scores = asked.sketch.astype(np.float64) @ self._known.sketches[rows].astype(np.float64).T
            rankings.append(
                summarise(
                    scores / self.settings.corpus_size, ids, draws, self.teacher_id, candidate_set, samples=samples
                )
            )
        return rankings

    def _ask(self, queries: Sequence[TeacherQuery], check: Check) -> list[AskedQuery]:
        unit = 2 if self.settings.antithetic else 1
        replicates = math.gcd(self.settings.query_draws // unit, self.settings.replicates)
        found: list[AskedQuery] = []
        for _place, block in query_blocks(
            self.model, self._layers, queries, self.settings, batch=self.batch, replicates=replicates, check=check
        ):
            # Linear, so replicates are projected as if each were a query.
            pairs = (
                (name, self.curvature.whiten({name: gradients.flatten(0, 1)}, self.settings.damping)[name])
                for name in block.names
                for gradients in [block.replicate_gradients(name)]
            )
            sketches = self.basis.project(pairs).reshape(block.count, replicates, -1)
            directions = None
            if self.token_basis is not None:
                plain = {name: block.replicate_gradients(name).flatten(0, 1) for name in block.names}
                natural = self.curvature.precondition(plain, self.settings.damping)
                directions = self.token_basis.directions(natural)
                directions = directions.reshape(block.count, replicates, *directions.shape[1:])
            found += [
                AskedQuery(sketches[row], None if directions is None else directions[row]) for row in range(block.count)
            ]
        return found

    def _complete(self, items: Sequence[TeacherItem], progress: Progress, check: Check) -> None:
        """Compute what is kept of items that have nothing yet."""
        rows = self._known.rows_of([item.item_id for item in items])
        missing = [item for item, row in zip(items, rows, strict=True) if row < 0]
        if missing:
            found = self.sketched(missing, progress=progress, check=check)
            if self._known.tokens is None and found.tokens is not None and not len(self._known.item_ids):
                self._known = found
            else:
                self._known = self._known.with_items(found.item_ids.tolist(), found.sketches, found.tokens)
