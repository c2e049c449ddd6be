"""The sketch teacher: near the first-order ranking of a whole corpus for one gradient of the query.

Why it exists: the first-order form needs a pass over the candidates; with their whitened gradients kept as short
vectors (``sketch_set``) a new query costs its own gradient, about a second, and an inner product per item
(reference/measured.md C5). The answer approximates the teacher whose gradients were sketched; it verifies nothing about
that teacher itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from byline.diffusion.model import DiffusionModel
from byline.teachers.first_order import AbuPlusLinear
from byline.teachers.natural_gradient import NaturalGradientTeacher, query_blocks
from byline.teachers.preconditioner import Preconditioner
from byline.teachers.ranking import (
    Check,
    Progress,
    Ranking,
    TeacherItem,
    TeacherQuery,
    ignore_progress,
    never_cancelled,
    summarise,
)
from byline.teachers.sketch_basis import SketchBasis
from byline.teachers.sketch_fit import whitened_items
from byline.teachers.sketch_set import SketchSet


class SketchTeacher(NaturalGradientTeacher):
    """Scores by sketches in ``basis``: tau = < sketch of the query, sketch of the item > / N.

    Settings are those the basis was fitted under, but for ``query_draws``, which buys accuracy with time.
    ``known`` holds ready item sketches; those of other items are computed, and kept in memory. The standard
    error, and the two halves, are those of the query's draws: an item's own noise is in its sketch, once.
    """

    method = "sketch"

    def __init__(
        self,
        model: DiffusionModel,
        curvature: Preconditioner,
        basis: SketchBasis,
        known: SketchSet | None = None,
        *,
        query_draws: int | None = None,
        batch: int = 128,
    ) -> None:
        """Raises TeacherNotUsable when basis, curvature and model do not belong together."""
        basis.require(curvature)
        settings = basis.settings if query_draws is None else replace(basis.settings, query_draws=query_draws)
        super().__init__(model, curvature, settings, batch)
        self.basis = basis
        self._linear = AbuPlusLinear(model, curvature, settings, batch)
        self._known: dict[int, NDArray[np.float32]] = {}
        if known is not None:
            self._known = dict(zip((int(i) for i in known.item_ids), known.sketches, strict=True))

    @property
    def teacher_id(self) -> str:
        """See ``Teacher``."""
        return f"{super().teacher_id}/{self.basis.name}"

    def fit(
        self,
        corpus: Sequence[TeacherItem],
        *,
        progress: Progress = ignore_progress,
        check: Check = never_cancelled,
    ) -> None:
        """Sketch the items that have none yet; the basis stays as it is."""
        self._complete(corpus, progress, check)

    def query_sketches(self, queries: Sequence[TeacherQuery], *, check: Check = never_cancelled) -> NDArray[np.float32]:
        """Sketches [q, replicates, d], one per replicate of a query's draws; their mean is the query's sketch."""
        unit = 2 if self.settings.antithetic else 1
        replicates = math.gcd(self.settings.query_draws // unit, self.settings.replicates)
        found = np.empty((len(queries), replicates, self.basis.dimensions), dtype=np.float32)
        for place, block in query_blocks(
            self.model, self._layers, queries, self.settings, batch=self.batch, replicates=replicates, check=check
        ):
            # Linear, so replicates are projected as if each were a query.
            pairs = (
                (name, self.curvature.whiten({name: gradients.flatten(0, 1)}, self.settings.damping)[name])
                for name in block.names
                for gradients in [block.replicate_gradients(name)]
            )
            found[place] = self.basis.project(pairs).reshape(block.count, replicates, -1)
        return found

    def query_sketch(self, query: TeacherQuery, *, check: Check = never_cancelled) -> NDArray[np.float32]:
        """Sketches [replicates, d] of one query; see ``query_sketches``."""
        found: NDArray[np.float32] = self.query_sketches([query], check=check)[0]
        return found

    def item_sketches(
        self,
        items: Sequence[TeacherItem],
        *,
        progress: Progress = ignore_progress,
        check: Check = never_cancelled,
    ) -> NDArray[np.float32]:
        """Sketches [n, d] of ``items`` from their own gradients, as new items need them."""
        found = np.empty((len(items), self.basis.dimensions), dtype=np.float32)
        for place, whitened in whitened_items(self._linear, items, progress, check):
            found[place] = self.basis.project(whitened)
        return found

    def score(
        self,
        query: TeacherQuery,
        candidates: Sequence[TeacherItem],
        *,
        candidate_set: str = "given",
        progress: Progress = ignore_progress,
        check: Check = never_cancelled,
    ) -> Ranking:
        """tau of every candidate for one query."""
        return self.score_many([query], candidates, candidate_set=candidate_set, progress=progress, check=check)[0]

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
        items = np.array([self._known[int(i)] for i in ids], dtype=np.float64).reshape(len(ids), -1)
        asked = self.query_sketches(queries, check=check).astype(np.float64)
        draws = self.settings.item_draws
        samples = np.full(len(ids), draws * (1 if self.settings.flips == "none" else 2), dtype=np.int32)
        return [
            summarise(
                sketch @ items.T / self.settings.corpus_size if len(ids) else np.empty((len(sketch), 0)),
                ids, draws, self.teacher_id, candidate_set, samples=samples,
            )
            for sketch in asked
        ]  # fmt: skip

    def _complete(self, items: Sequence[TeacherItem], progress: Progress, check: Check) -> None:
        """Compute the sketches of items that have none."""
        missing = [item for item in items if item.item_id not in self._known]
        if missing:
            found = self.item_sketches(missing, progress=progress, check=check)
            self._known |= {item.item_id: sketch for item, sketch in zip(missing, found, strict=True)}
