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
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from byline.evaluation.bench_agreement import Curve, Scores, agreement, cheapest, evenly
from byline.evaluation.bench_clock import Cost, measured
from byline.evaluation.bench_plan import Bench, Findings, common_chunk, cost_row, published_row
from byline.evaluation.bench_rows import Step
from byline.evaluation.published_teacher import PublishedTeacher
from byline.teachers.abu_plus import AbuPlus
from byline.teachers.first_order import AbuPlusLinear
from byline.teachers.natural_gradient import UnlearningSettings
from byline.teachers.ranking import TeacherQuery
from byline.teachers.sketch import SketchTeacher
from byline.teachers.sketch_fit import fit_sketches
from byline.teachers.sketch_set import SketchSet

log = logging.getLogger(__name__)


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
        return [cost_row("reference", bench.reference, len(items), len(queries), cost)], {"tau": tau, "other": other}

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
        row = published_row("published baselines", bench, len(items), 1, cost) | {"step": step}
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
            row = published_row("published", bench, len(items), 1, cost) | {"breakdown": scores.seconds}
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
        return [cost_row("budgets", bench.ours, len(items), len(queries), cost)], {"replicates": replicates}

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


def choose(bench: Bench, findings: Findings) -> None:
    """Budgets that agree with the reference as well as the published form: for many queries, and for one.

    By the curves through all budgets, not by the luck of one: over few queries it is worth several draws.
    """
    size, published = bench.size, findings.published
    curve = Curve.fit(list(published), [found["spearman"] for found in published.values()])
    for k in size.our_query_draws:
        # Replicates that divide their number are spread evenly, like the published form's timesteps.
        halvings = [t for budget, t in findings.table if budget == k and size.draws % t == 0]
        findings.curves[k] = Curve.fit(halvings, [findings.table[k, t]["spearman"] for t in halvings])
    findings.published_curve = curve
    target = curve.at(size.draws)
    limits = {"unit": bench.ours.replicates * (2 if bench.antithetic else 1), "most": 2 * size.draws}
    counts = {"many": (size.query_counts[-1], size.corpus_sizes[-1]), "single": (1, size.agreement_items)}
    for name, (queries, items) in counts.items():
        choice = cheapest(findings.curves, target, query_cost=queries, item_cost=items, **limits)
        findings.choices[name] = choice
        log.info("budget for %s queries: %s (the published form reaches %.4f)", name, choice, target)


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
                parts.append(teacher.direction_halves(queries[start:stop]))  # what ``score_many`` does, and its passes
                gradients.mark(str(stop))
        halves = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}  # [2, q, ...]
        del parts

        with measured(bench.model) as corpus:
            def reached(done: int, _total: int) -> None:
                for count in size.corpus_sizes:
                    if done >= count and str(count) not in corpus.marks:
                        corpus.mark(str(count))

            stacked = {name: half.flatten(0, 1) for name, half in halves.items()}
            found = teacher.replicates(stacked, items, reached, chunk=common_chunk(size.corpus_sizes))
        mean = found.mean(1).reshape(len(items), 2, len(queries)).mean(1).T  # [q, n]
        tau = mean[: size.agreement_queries, : size.agreement_items]
        both = Cost(gradients.seconds + corpus.seconds, gradients.wall + corpus.wall, gradients.unet + corpus.unet,
                    gradients.forwards + corpus.forwards, gradients.backwards + corpus.backwards)  # fmt: skip
        for count in size.corpus_sizes:
            row = cost_row("first_order", settings, count, len(queries), both)
            row["seconds"] = gradients.seconds + corpus.marks[str(count)]
            row["breakdown"] = {"query_gradients": gradients.seconds, "corpus_pass": corpus.marks[str(count)]}
            if count != len(items):
                for name in ("wall_seconds", "unet_share", "forwards", "backwards"):
                    row.pop(name)
            rows.append(row)
        rows[-1]["breakdown"]["corpus_pass_outside_unet"] = corpus.seconds - corpus.unet
        rows[-1]["agreement"] = agreement(tau, reference)
        for count in size.query_counts:
            few = {name: half[:, :count].flatten(0, 1) for name, half in halves.items()}
            with measured(bench.model) as cost:
                teacher.replicates(few, items[: size.growth_items])
            row = cost_row("first_order", settings, size.growth_items, count, cost)
            row["seconds"] += gradients.marks[str(count)]
            row["breakdown"] = {"query_gradients": gradients.marks[str(count)], "corpus_pass": cost.seconds}
            rows.append(row)
        return rows, {"tau": tau}

    name = f"many-{choice.query_draws}x{choice.item_draws}-{size.query_counts[-1]}x{size.corpus_sizes[-1]}"
    findings.rows += bench.run(name + bench.variant, work)[0]


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
        row = cost_row(name, settings, len(items), count, cost) | {
            "breakdown": {"baselines_once": fitting.seconds},
            "samples_per_item": float(np.mean([ranking.samples.mean() for ranking in rankings])),
            "agreement": agreement(tau, reference[:count]),
        }
        return [row], {"tau": tau}

    # The gate is between forms of one budget, the largest; the race is run at the budget of equal agreement.
    rows, exact = bench.run(f"exact-{count}{bench.variant}", lambda: one("exact", bench.ours))
    findings.rows += rows
    findings.rows += bench.run(f"racing-{count}{bench.variant}", lambda: one("exact_racing", racing))[0]
    findings.figures["gate"] = agreement(first_order[:count], exact["tau"])
    findings.figures["self"] = agreement(other[:count], exact["tau"])


def measure_sketches(bench: Bench, reference: Scores, findings: Findings) -> None:
    """Each judged query's own gradient against the sketches of all items; the sketches given, or fitted here."""
    queries, items = bench.judged
    size = bench.size
    draws = max(size.our_query_draws)
    given = None if bench.sketches is None else SketchSet.load(bench.sketches, bench.model.revision)
    if given is not None and given.basis.settings.objective != bench.ours.objective:
        given = None  # sketches of another objective are of another teacher than the reference

    def work() -> Step:
        with tempfile.TemporaryDirectory() as folder, measured(bench.model) as fitting:
            known = given
            if known is None:
                teacher = bench.linear(replace(bench.ours, item_draws=size.sketch_draws, query_draws=draws))
                known = fit_sketches(
                    teacher, bench.items, dimensions=size.sketch_dimensions, fidelity_queries=queries,
                    store=Path(folder), seed=bench.seed,
                )  # fmt: skip
        sketch = SketchTeacher(
            bench.model, bench.curvature, known.basis, known, query_draws=draws, batch=bench.batch
        )  # fmt: skip
        with measured(bench.model) as cost:
            rankings = sketch.score_many(queries, items)
        tau = np.stack([ranking.tau for ranking in rankings]).astype(np.float64)
        row = cost_row("sketch", sketch.settings, len(known.item_ids), len(queries), cost) | {
            "breakdown": {"fit_once": fitting.seconds}, "dimensions": known.basis.dimensions,
            "fidelity": {name: value for name, value in known.fidelity.items() if not math.isnan(value)},
            "agreement": agreement(tau, reference), "given": given is not None,
        }  # fmt: skip
        return [row], {"tau": tau}

    origin = "given" if given is not None else "fitted"
    findings.rows += bench.run(f"sketches-{origin}-{len(bench.items)}{bench.variant}", work)[0]
