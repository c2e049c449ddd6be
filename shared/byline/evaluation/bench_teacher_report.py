"""From measured steps to the figures of ``reports/bench/teacher.json``, and the figure.

Why it exists: ratios are where a benchmark can flatter itself, so the arithmetic stands apart from the measuring, is
tested on numbers made up, and says of every row whether it was run or follows from one that was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from byline.errors import LabelsNotUsable
from byline.evaluation.bench_plan import Findings

Row = Mapping[str, Any]


class PublishedCost:
    """The published form's seconds as a function of items and queries, from its measured rows.

    Linear in both by construction: nothing in it is shared between queries but, over a whole corpus, the losses
    before the step. Reading weights and factors back from disk is left out everywhere (``restore`` says what it
    costs), so that no ratio rests on it.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        """``rows``: at least one of the form ``published``, and ``published baselines``."""
        scored = [row for row in rows if row["form"] == "published"]
        before = [row for row in rows if row["form"] == "published baselines"]
        if not scored or not before:
            raise LabelsNotUsable("the published form has not been measured")
        parts = {part: _mean([row["breakdown"][part] for row in scored]) for part in scored[0]["breakdown"]}
        self.items = int(scored[0]["items"])
        self.item_draws = int(scored[0]["item_draws"])
        self.query_draws = int(scored[0]["query_draws"])
        self.query = parts["gradient"] + parts["step"]
        self.restore = parts["restore"]
        # Before and after are the same forward passes; both were timed, and the mean of all is the fairest.
        self.losses = _mean([*(row["breakdown"]["losses"] for row in scored), *(row["seconds"] for row in before)])

    def seconds(self, items: int, queries: int, baselines: str) -> float:
        """All queries; ``baselines`` ``once`` (whole corpus) or ``recomputed`` for every query (neighbours, §3.4)."""
        sweeps = 2 * queries if baselines == "recomputed" else queries + 1
        return queries * self.query + sweeps * self.losses * items / self.items

    def row(self, items: int, queries: int, baselines: str) -> dict[str, Any]:
        """As a row of the result file."""
        seconds = self.seconds(items, queries, baselines)
        return {
            "form": f"published, baselines {baselines}", "items": items, "queries": queries,
            "query_draws": self.query_draws, "item_draws": self.item_draws, "seconds": seconds,
            "seconds_per_query": seconds / queries, "extrapolated": True,
        }  # fmt: skip


def figures(findings: Findings, corpus_size: int) -> dict[str, Any]:
    """Everything but ``gate`` and ``self``; ratios are of seconds, at equal agreement unless named otherwise."""
    rows, curve = findings.rows, findings.published_curve
    published = PublishedCost(rows)
    if curve is None:
        raise LabelsNotUsable("budgets have not been chosen")
    linear = [row for row in rows if row["form"] == "first_order"]
    many = max(linear, key=lambda row: (row["queries"], row["items"]))
    target = curve.at(published.item_draws)
    out: dict[str, Any] = {
        "many_queries_ratio": published.seconds(many["items"], many["queries"], "once") / many["seconds"],
        "many_queries": _many(published, many, corpus_size) | {"target_spearman": target},
        "published": {
            "agreement_by_item_draws": {str(k): dict(v) for k, v in findings.published.items()},
            "seconds_per_query": {"gradient_and_step": published.query, "losses": published.losses,
                                  "restore_not_counted": published.restore},
        },
        "first_order_agreement": [
            {"query_draws": k, "item_draws": t} | dict(found) for (k, t), found in sorted(findings.table.items())
        ],
        "item_draws_for_equal_agreement": {
            str(k): ours.draws(target) for k, ours in sorted(findings.curves.items())
        },
    }  # fmt: skip
    single = {row["form"]: row for row in rows if row["form"] in ("exact", "exact_racing")}
    if "exact_racing" in single:
        one = published.seconds(single["exact_racing"]["items"], 1, "recomputed")
        race = single["exact_racing"]
        out["single_query_ratio"] = one / (race["seconds"] / race["queries"])
        exact = single["exact"]
        per_query = exact["seconds"] / exact["queries"]
        out["single_query"] = {
            "published_seconds": one, "racing_seconds": race["seconds"] / race["queries"],
            "exact_largest_budget_seconds": per_query, "ratio_exact_largest_budget": one / per_query,
            "ratio_exact_equal_agreement_scaled": one / (per_query * race["item_draws"] / exact["item_draws"]),
            "samples_saved_by_racing": 1 - race["samples_per_item"] / race["item_draws"],
            "baselines_once_seconds": race["breakdown"]["baselines_once"],
            "agreement": {"racing": race["agreement"], "exact": exact["agreement"]},
        }  # fmt: skip
    for row in rows:
        if row["form"] == "sketch":
            per_query = row["seconds"] / row["queries"]
            sweep = published.seconds(row["items"], 1, "recomputed")
            out["estimated"] = {
                **{k: row[k] for k in ("items", "dimensions", "query_draws", "item_draws", "fidelity", "agreement")},
                "seconds_per_query": per_query, "ratio_to_published_single_query": sweep / per_query,
            }  # fmt: skip
    sizes = sorted({row["items"] for row in linear})
    counts = sorted({row["queries"] for row in linear})
    grown = [published.row(n, q, kind) for n in sizes for q in counts for kind in ("once", "recomputed")]
    out["rows"] = [_per_query(row) for row in rows] + grown
    return out


def _many(published: PublishedCost, many: Row, corpus_size: int) -> dict[str, Any]:
    items, queries = many["items"], many["queries"]
    gradients, corpus = many["breakdown"]["query_gradients"], many["breakdown"]["corpus_pass"]
    whole = gradients + corpus * corpus_size / items
    equal_draws = (
        gradients * published.query_draws / many["query_draws"] + corpus * published.item_draws / many["item_draws"]
    )
    return {
        "items": items, "queries": queries, "query_draws": many["query_draws"], "item_draws": many["item_draws"],
        "seconds": many["seconds"], "query_gradients_seconds": gradients, "corpus_pass_seconds": corpus,
        "unet_share": many.get("unet_share"), "cost_in_forwards": many["seconds"] * many["forwards_per_second"],
        "ratio_baselines_recomputed": published.seconds(items, queries, "recomputed") / many["seconds"],
        "ratio_equal_draws": published.seconds(items, queries, "once") / equal_draws,
        "whole_corpus_extrapolated": {
            "items": corpus_size,
            "ratio": published.seconds(corpus_size, queries, "once") / whole,
            "ratio_baselines_recomputed": published.seconds(corpus_size, queries, "recomputed") / whole,
        },
    }  # fmt: skip


def _per_query(row: Row) -> dict[str, Any]:
    return dict(row) | {"seconds_per_query": row["seconds"] / row["queries"]}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def draw(figures: Mapping[str, Any], path: Path) -> bool:
    """Seconds per query against queries and against items, by form; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in figures["rows"] if row["form"].split(",")[0] in ("published", "first_order", "exact",
                                                                             "exact_racing", "sketch")]  # fmt: skip
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    smallest = min(row["items"] for row in rows if row["form"] == "first_order")
    most = max(row["queries"] for row in rows)
    for form in sorted({row["form"] for row in rows}):
        for axes, name, fixed, value in ((left, "queries", "items", smallest), (right, "items", "queries", most)):
            points = {r[name]: r["seconds_per_query"] for r in rows if r["form"] == form and r[fixed] == value}
            if points:
                axes.plot(*zip(*sorted(points.items()), strict=True), marker="o", label=form)
    for axes, text in ((left, f"queries ({smallest} items)"), (right, f"items ({most} queries)")):
        axes.set(xscale="log", yscale="log", xlabel=text, ylabel="CPU seconds per query")
        axes.grid(True, which="both", alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True
