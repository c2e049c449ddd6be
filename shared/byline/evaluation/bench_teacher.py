"""The published unlearning teacher and ours, side by side in one process: cost at equal agreement.

Why it exists: `make bench-teacher`. Every claim about the teacher's cost is a ratio of two things measured here, one
after the other, on the same items and queries: the published procedure (``published_teacher``) and ours in each form. A
reference of independent noise and a larger budget, which is neither of them, says how good each is; draws are then
chosen so that both are equally good.

Steps, each kept when done (``bench_rows``): the reference; the published form, query by query; a first-order pass that
tells the agreement of every budget; many queries, at the budget chosen from it; one query, exact and racing; sketches.
The reference is first-order: at these steps the exact form ranks as it does (the gate, measured here too), and it
has no rounding.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from byline.diffusion.model import DiffusionModel
from byline.evaluation.bench_agreement import Choice, Scores, agreement, cheapest, evenly
from byline.evaluation.bench_clock import Cost, forwards_per_second, measured
from byline.evaluation.bench_rows import RowFile, Step
from byline.evaluation.published_teacher import PublishedSettings, PublishedTeacher
from byline.teachers.abu_plus import AbuPlus
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
    budget for an item and the largest of ours.
    """

    corpus_sizes: tuple[int, ...] = (250, 500, 1000)
    query_counts: tuple[int, ...] = (1, 8, 40, 200)
    growth_items: int = 50
    agreement_items: int = 250
    agreement_queries: int = 4
    single_queries: int = 2
    draws: int = 64
    reference_draws: int = 128
    reference_query_draws: int = 1024
    published_query_draws: int = 1024
    our_query_draws: tuple[int, ...] = (64, 128, 256, 512)
    memory_items: int = 128


SIZES = {
    "tiny": BenchSize((8, 12), (1, 3), 4, 8, 3, 1, 16, 32, 32, 16, (8, 16), 0),
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
    choices: dict[str, Choice] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)


def measure_reference(bench: Bench) -> tuple[Scores, Scores]:
    """The reference, and a first-order teacher of the same noise family but our largest budget: [q, n] each."""

    def plain(settings: UnlearningSettings) -> AbuPlusLinear:
        return AbuPlusLinear(bench.model, bench.curvature, settings, bench.batch)

    def work() -> Step:
        queries, items = bench.judged
        teacher = plain(bench.reference)
        with measured(bench.model) as cost:
            wide = teacher.directions(queries)
            narrow = plain(replace(bench.reference, query_draws=bench.ours.query_draws)).directions(queries)
            stacked = {name: torch.cat([wide[name], narrow[name]]) for name in wide}
            found = teacher.replicates(stacked, items)  # [n, r, 2 q]
        count = found.shape[1] * bench.size.draws // bench.size.reference_draws
        tau = found[:, :, : len(queries)].mean(1).T
        other = found[:, evenly(found.shape[1], count), len(queries) :].mean(1).T
        return [_row("reference", bench.reference, len(items), len(queries), cost)], {"tau": tau, "other": other}

    _, arrays = bench.run("reference", work)
    return arrays["tau"], arrays["other"]


def measure_published(bench: Bench, reference: Scores, findings: Findings) -> None:
    """The published form on every judged query, one step each; its agreement at every budget it contains."""
    queries, items = bench.judged
    teacher = PublishedTeacher(bench.model, bench.factors, bench.published)
    prepared = teacher.prepare(items)

    def baselines() -> Step:
        teacher.restore()
        exact = AbuPlus(bench.model, bench.curvature, bench.ours, bench.batch)
        step = exact.calibrate(teacher.direction(teacher.query_gradient(queries[0])), queries[0])
        with measured(bench.model) as cost:
            losses = teacher.losses(*prepared)
        row = _published_row("published baselines", bench, len(items), 1, cost) | {"step": step}
        return [row], {"losses": losses.numpy(), "step": np.array(step)}

    rows, before = bench.run("published-baselines", baselines)
    findings.rows += rows
    rises = []
    for number, query in enumerate(queries):

        def score(query: TeacherQuery = query) -> Step:
            try:
                with measured(bench.model) as cost:
                    scores = teacher.score(query, prepared, torch.from_numpy(before["losses"]), float(before["step"]))
            finally:
                teacher.restore()
            row = _published_row("published", bench, len(items), 1, cost) | {"breakdown": scores.seconds}
            return [row], {"rises": scores.rises.numpy()}

        rows, arrays = bench.run(f"published-{number}", score)
        findings.rows += rows
        rises.append(arrays["rises"])
    stacked = np.stack(rises).astype(np.float64)  # [q, n, draws]
    budget = bench.size.draws
    while budget >= 8 and bench.size.draws % budget == 0:
        # Every second of equally spaced timesteps is the published form of half the draws.
        findings.published[budget] = agreement(stacked[:, :, :: bench.size.draws // budget].mean(2), reference)
        budget //= 2


def measure_budgets(bench: Bench, reference: Scores, other: Scores, findings: Findings) -> dict[int, Scores]:
    """One first-order pass with the directions of every query budget; agreement of each (query, item) budget.

    Returns the scores [q, n] at the largest item budget by query budget, for the gate.
    """
    queries, items = bench.judged
    budgets = bench.size.our_query_draws

    def work() -> Step:
        with measured(bench.model) as cost:
            found = [bench.linear(replace(bench.ours, query_draws=k)).directions(queries) for k in budgets]
            stacked = {name: torch.cat([one[name] for one in found]) for name in found[0]}
            replicates = bench.linear(bench.ours).replicates(stacked, items)  # [n, r, budgets * q]
        return [_row("budgets", bench.ours, len(items), len(queries), cost)], {"replicates": replicates}

    rows, arrays = bench.run(f"budgets{bench.variant}", work)
    findings.rows += rows
    replicates = arrays["replicates"]
    count = replicates.shape[1]
    unit = count * (2 if bench.antithetic else 1)  # a budget must split into as many replicates itself
    for number, k in enumerate(budgets):
        part = replicates[:, :, number * len(queries) : (number + 1) * len(queries)]
        for r in range(1, count + 1):
            draws = r * bench.size.draws // count
            if draws % unit == 0:
                findings.table[k, draws] = agreement(part[:, evenly(count, r)].mean(1).T, reference)
    whole = {k: replicates[:, :, i * len(queries) : (i + 1) * len(queries)].mean(1).T for i, k in enumerate(budgets)}
    return whole


def choose(bench: Bench, findings: Findings, seconds_per_evaluation: float) -> None:
    """Budgets that agree with the reference as well as the published form: for many queries, and for one."""
    target = findings.published[bench.size.draws]["spearman"]
    table = {key: found["spearman"] for key, found in findings.table.items()}
    queries, items = bench.size.query_counts[-1], bench.size.corpus_sizes[-1]
    findings.choices["many"] = cheapest(
        table, target, queries * seconds_per_evaluation, items * seconds_per_evaluation
    )  # fmt: skip
    findings.choices["single"] = cheapest(table, target, seconds_per_evaluation, items * seconds_per_evaluation)
    for name, choice in findings.choices.items():
        log.info("budget for %s queries: %s (published reaches %.4f)", name, choice, target)


def measure_many(bench: Bench, reference: Scores, findings: Findings) -> None:
    """All queries over the largest corpus in one pass, at the chosen budget; and fewer queries over few items."""
    choice = findings.choices["many"]
    settings = replace(bench.ours, query_draws=choice.query_draws, item_draws=choice.item_draws)
    size = bench.size

    def work() -> Step:
        teacher = bench.linear(settings)
        queries = bench.queries[: size.query_counts[-1]]
        items = bench.items[: size.corpus_sizes[-1]]
        rows: list[dict[str, Any]] = []
        with measured(bench.model) as gradients:
            parts = []
            for start, stop in zip((0, *size.query_counts), size.query_counts, strict=False):
                parts.append(teacher.directions(queries[start:stop]))
                gradients.mark(str(stop))
        directions = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

        with measured(bench.model) as corpus:
            def reached(done: int, _total: int) -> None:
                for count in size.corpus_sizes:
                    if done >= count and str(count) not in corpus.marks:
                        corpus.mark(str(count))

            found = teacher.replicates(directions, items, reached, chunk=_chunk(size.corpus_sizes))
        tau = found[:, :, : size.agreement_queries].mean(1).T[:, : size.agreement_items]
        both = Cost(gradients.seconds + corpus.seconds, gradients.wall + corpus.wall, gradients.unet + corpus.unet,
                    gradients.forwards + corpus.forwards, gradients.backwards + corpus.backwards)  # fmt: skip
        for count in size.corpus_sizes:
            row = _row("first_order", settings, count, len(queries), both)
            row["seconds"] = gradients.seconds + corpus.marks[str(count)]
            row["breakdown"] = {"query_gradients": gradients.seconds, "corpus_pass": corpus.marks[str(count)]}
            if count != len(items):
                for name in ("wall_seconds", "unet_share", "forwards", "backwards"):
                    row.pop(name)
            rows.append(row)
        rows[-1]["breakdown"]["corpus_pass_outside_unet"] = corpus.seconds - corpus.unet
        rows[-1]["agreement"] = agreement(tau, reference)
        for count in size.query_counts[:-1]:
            few = {name: direction[:count] for name, direction in directions.items()}
            with measured(bench.model) as cost:
                teacher.replicates(few, items[: size.growth_items])
            row = _row("first_order", settings, size.growth_items, count, cost)
            row["seconds"] += gradients.marks[str(count)]
            row["breakdown"] = {"query_gradients": gradients.marks[str(count)], "corpus_pass": cost.seconds}
            rows.append(row)
        return rows, {"tau": tau}

    findings.rows += bench.run(f"many{bench.variant}", work)[0]


def measure_single(bench: Bench, reference: Scores, first_order: Scores, other: Scores, findings: Findings) -> None:
    """One query at a time: exact on cached baselines, exact with racing; and the gate between the forms.

    ``first_order`` and ``other`` [q, n]: the first order under the same noise, and under that of another seed.
    """
    choice = findings.choices["single"]
    racing = replace(
        bench.ours, query_draws=choice.query_draws, item_draws=choice.item_draws,
        racing=min(100, bench.size.agreement_items // 3),
    )  # fmt: skip
    count = bench.size.single_queries
    queries, items = bench.judged[0][:count], bench.judged[1]

    def one(name: str, settings: UnlearningSettings) -> Step:
        with tempfile.TemporaryDirectory() as folder:
            teacher = AbuPlus(bench.model, bench.curvature, settings, bench.batch, Path(folder))
            with measured(bench.model) as fitting:
                teacher.fit(items)
            with measured(bench.model) as cost:
                rankings = [teacher.score(query, items) for query in queries]
        tau = np.stack([ranking.tau for ranking in rankings]).astype(np.float64)
        row = _row(name, settings, len(items), count, cost) | {
            "breakdown": {"baselines_once": fitting.seconds},
            "samples_per_item": float(np.mean([ranking.samples.mean() for ranking in rankings])),
            "agreement": agreement(tau, reference[:count]),
        }
        return [row], {"tau": tau}

    # The gate is between forms of one budget, the largest; the race is run at the budget of equal agreement.
    rows, exact = bench.run(f"exact{bench.variant}", lambda: one("exact", bench.ours))
    findings.rows += rows
    findings.rows += bench.run(f"exact-racing{bench.variant}", lambda: one("exact_racing", racing))[0]
    findings.figures["gate"] = agreement(first_order[:count], exact["tau"])
    findings.figures["self"] = agreement(other[:count], exact["tau"])


def _chunk(sizes: tuple[int, ...], most: int = 64) -> int:
    """The largest number of items up to ``most`` that divides every corpus size, so that each can be timed."""
    whole = math.gcd(*sizes)
    return max(size for size in range(1, most + 1) if whole % size == 0)


def _row(form: str, settings: UnlearningSettings, items: int, queries: int, cost: Cost) -> dict[str, Any]:
    return {
        "form": form, "items": items, "queries": queries, "query_draws": settings.query_draws,
        "item_draws": settings.item_draws, "extrapolated": False, **cost.row(),
    }  # fmt: skip


def _published_row(form: str, bench: Bench, items: int, queries: int, cost: Cost) -> dict[str, Any]:
    settings = bench.published
    return {
        "form": form, "items": items, "queries": queries, "query_draws": settings.query_draws,
        "item_draws": settings.item_draws, "extrapolated": False, **cost.row(),
    }  # fmt: skip
