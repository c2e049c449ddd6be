"""What the teachers' benchmark measures on, and how much of it.

Why it exists: every step of ``bench_teacher`` shares the same model, items, queries and settings; a size is one name.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from byline.diffusion.model import DiffusionModel
from byline.evaluation.bench_agreement import Choice, Curve
from byline.evaluation.bench_clock import Cost, forwards_per_second
from byline.evaluation.bench_rows import RowFile, Step
from byline.evaluation.published_teacher import PublishedSettings
from byline.teachers.curvature import Curvature
from byline.teachers.first_order import AbuPlusLinear
from byline.teachers.natural_gradient import UnlearningSettings
from byline.teachers.ranking import TeacherItem, TeacherQuery

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchSize:
    """How much is measured.

    Agreement is judged on ``agreement_queries`` queries over the first ``agreement_items`` items. ``corpus_sizes``
    and ``query_counts`` show the growth, the latter over ``growth_items`` items. ``draws`` is the published form's
    budget for an item and the largest of ours. Sketches are fitted here only where none are given.
    """

    corpus_sizes: tuple[int, ...] = (250, 500, 1000)
    query_counts: tuple[int, ...] = (1, 8, 40, 200)
    growth_items: int = 25
    agreement_items: int = 250
    agreement_queries: int = 4
    single_queries: int = 2
    draws: int = 64
    sketch_draws: int = 32
    sketch_dimensions: int = 512
    reference_draws: int = 128
    reference_query_draws: int = 1024
    published_query_draws: int = 1024
    our_query_draws: tuple[int, ...] = (64, 128, 256, 512)
    memory_items: int = 128


SIZES = {
    "tiny": BenchSize((8, 12), (1, 3), 4, 8, 3, 1, 16, 16, 6, 32, 32, 16, (8, 16), 0),
    "default": BenchSize(),
    "large": BenchSize((500, 1000, 2000), agreement_items=500, agreement_queries=8, reference_draws=256),
}


@dataclass(frozen=True)
class Bench:
    """What all steps share. ``items`` and ``queries`` are already in the order in which they are used.

    ``corpus_size`` is N of the step 1 / N: that of the whole corpus, whatever part of it is scored.
    """

    model: DiffusionModel
    curvature: Curvature
    factors: Path
    items: list[TeacherItem]
    queries: list[TeacherQuery]
    corpus_size: int
    size: BenchSize
    rows: RowFile
    seed: int = 0
    batch: int = 128
    antithetic: bool = False
    autocast: bool = False
    images_per_batch: int = 2
    sketches: Path | None = None

    @property
    def ours(self) -> UnlearningSettings:
        """Our settings at the largest budgets: one noise set for all items."""
        return UnlearningSettings(
            self.corpus_size, query_draws=max(self.size.our_query_draws), item_draws=self.size.draws, seed=self.seed,
            noise="shared", antithetic=self.antithetic,
        )  # fmt: skip

    @property
    def variant(self) -> str:
        """What tells our steps of this run from those of another over the same published ones."""
        return "-antithetic" * self.antithetic + "-bfloat16" * self.autocast

    @property
    def reference(self) -> UnlearningSettings:
        """The reference's: noise of its own seed, for every item its own, no common draws."""
        return UnlearningSettings(
            self.corpus_size, query_draws=self.size.reference_query_draws, item_draws=self.size.reference_draws,
            seed=self.seed + 1000,
        )  # fmt: skip

    @property
    def published(self) -> PublishedSettings:
        """The published form's."""
        return PublishedSettings(
            self.size.published_query_draws, self.size.draws, images_per_batch=self.images_per_batch,
            query_batch=self.batch, seed=self.seed + 2000,
        )  # fmt: skip

    @property
    def judged(self) -> tuple[list[TeacherQuery], list[TeacherItem]]:
        """Queries and items on which agreement is measured."""
        return self.queries[: self.size.agreement_queries], self.items[: self.size.agreement_items]

    def linear(self, settings: UnlearningSettings) -> AbuPlusLinear:
        """The first-order form."""
        return AbuPlusLinear(self.model, self.curvature, settings, self.batch, autocast=self.autocast)

    def run(self, name: str, work: Callable[[], Step]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """A step, kept; its rows also say how fast the machine was before and after."""

        def with_yardstick() -> Step:
            before = forwards_per_second(self.model, self.batch)
            rows, arrays = work()
            speed = (before + forwards_per_second(self.model, self.batch)) / 2
            return [row | {"forwards_per_second": round(speed, 1)} for row in rows], arrays

        rows, arrays = self.rows.once(name, with_yardstick)
        for row in rows:
            log.info("%s: %s", name, {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
        return rows, arrays


@dataclass
class Findings:
    """What the steps left for the report. Scores are [q, n] over the judged queries and items."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    table: dict[tuple[int, int], dict[str, float]] = field(default_factory=dict)
    published: dict[int, dict[str, float]] = field(default_factory=dict)
    curves: dict[int, Curve] = field(default_factory=dict)
    published_curve: Curve | None = None
    choices: dict[str, Choice] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)


def common_chunk(sizes: tuple[int, ...], most: int = 64) -> int:
    """The largest number of items up to ``most`` that divides every corpus size, so that each can be timed."""
    whole = math.gcd(*sizes)
    return max(size for size in range(1, most + 1) if whole % size == 0)


def cost_row(form: str, settings: UnlearningSettings, items: int, queries: int, cost: Cost) -> dict[str, Any]:
    """A measured row of one of ours."""
    return {
        "form": form, "items": items, "queries": queries, "query_draws": settings.query_draws,
        "item_draws": settings.item_draws, "extrapolated": False, **cost.row(),
    }  # fmt: skip


def published_row(form: str, bench: Bench, items: int, queries: int, cost: Cost) -> dict[str, Any]:
    """A measured row of the published form."""
    settings = bench.published
    return {
        "form": form, "items": items, "queries": queries, "query_draws": settings.query_draws,
        "item_draws": settings.item_draws, "extrapolated": False, **cost.row(),
    }  # fmt: skip
