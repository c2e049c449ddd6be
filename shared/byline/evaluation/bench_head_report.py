"""From training runs to the figures of ``reports/bench/head.json``, and the figure.

Why it exists: ratios are where a benchmark can flatter itself, so the arithmetic stands apart from the running and is
tested on numbers made up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from byline.errors import LabelsNotUsable
from byline.evaluation.bootstrap import paired_bootstrap
from byline.evaluation.head_measures import gain_json
from byline.evaluation.head_report import HeadReport

DoubleArray = npt.NDArray[np.float64]
Row = Mapping[str, Any]
#: AP per held-out query, averaged over seeds, by trainer and L.
Precisions = Mapping[str, Mapping[int, DoubleArray]]


def figures(rows: Sequence[Row], precisions: Precisions, reports: Mapping[int, HeadReport], *, ours: Sequence[str],
            published: Sequence[str], main_cutoff: int, seed: int) -> dict[str, Any]:
    """Everything the result file says; ``reports`` has the baselines of the same held-out queries for every L.

    The headline is the first of ``ours`` against the best of ``published`` at the main L: the choice that flatters
    them. ``comparisons`` has every one of ours against every one of theirs, ``by_L`` every trainer beside every
    baseline.
    """
    if not ours or not published or any(name not in precisions for name in (*ours, *published)):
        raise LabelsNotUsable(f"all of {', '.join((*ours, *published)) or 'no trainer'} must have been run")
    runs = {name: [row for row in rows if row["trainer"] == name] for name in precisions}
    by_cutoff = {str(cutoff): _at_cutoff({name: precisions[name] for name in (*ours, *published)}, report, cutoff, seed)
                 for cutoff, report in reports.items()}
    best = max(published, key=lambda name: float(precisions[name][main_cutoff].mean()))
    compared = [_compared(mine, theirs, runs, precisions, list(reports), seed) for mine in ours for theirs in published]
    main = next(found for found in compared if (found["ours"], found["published"]) == (ours[0], best))
    at_main = by_cutoff[str(main_cutoff)]["trainers"]
    return {
        "time_ratio": main["time_ratio"], "wall_time_ratio": main["wall_time_ratio"],
        "pairs_per_second_ratio": main["pairs_per_second_ratio"],
        "map": {"ours": at_main[ours[0]]["map"], "published": at_main[best]["map"], "L": main_cutoff,
                "queries": int(precisions[best][main_cutoff].shape[0])},
        "map_ratio": main["by_L"][str(main_cutoff)]["ratio"],
        "p_value": max(gain["p_value"] for gain in at_main[ours[0]]["gain_over_raw"].values()),
        "share_of_ceiling": at_main[ours[0]]["share_of_ceiling"], "compared": {"ours": ours[0], "published": best},
        "by_L": by_cutoff, "comparisons": compared, "rows": [dict(row) for row in rows],
    }


def _compared(ours: str, published: str, runs: Mapping[str, Sequence[Row]], precisions: Precisions,
              cutoffs: Sequence[int], seed: int) -> dict[str, Any]:
    mine, theirs = runs[ours], runs[published]
    pairs = {cutoff: (precisions[ours][cutoff], precisions[published][cutoff]) for cutoff in cutoffs}
    return {
        "ours": ours, "published": published, **against(mine, theirs),
        "wall_time_ratio": _mean(theirs, "wall_seconds") / _mean(mine, "wall_seconds"),
        "pairs_per_second_ratio": _mean(mine, "pairs_per_second") / _mean(theirs, "pairs_per_second"),
        "by_L": {str(cutoff): {"ratio": float(a.mean() / b.mean()),
                               "gain": gain_json(paired_bootstrap(a, b, seed=seed))}
                 for cutoff, (a, b) in pairs.items()},
    }  # fmt: skip


def against(mine: Sequence[Row], other: Sequence[Row]) -> dict[str, Any]:
    """Ours and another trainer along the way, on the validation queries, averaged over seeds.

    ``seconds_to_equal`` is when ours first reached the best value the other ever had (None: never, in some seed),
    ``other_seconds_to_best`` when the other had it; ``other_at_our_seconds`` and ``other_at_our_pairs`` are what the
    other had when it had spent what ours spends in all, NaN-free: its value before the first step if it is slower.
    """
    best = float(np.mean([max(p["map"] for p in row["validation_curve"]) for row in other]))
    reached = [first_reach(row["validation_curve"], best) for row in mine]
    own = [first_reach(row["validation_curve"], max(p["map"] for p in row["validation_curve"])) for row in other]
    to_best = float(np.mean([point["seconds"] for point in own if point]))
    equal = None if any(point is None for point in reached) else float(np.mean([p["seconds"] for p in reached if p]))
    return {
        "time_ratio": _mean(other, "seconds") / _mean(mine, "seconds"),
        "other_best_validation_map": best, "other_seconds_to_best": to_best, "seconds_to_equal": equal,
        "time_to_equal_ratio": None if equal is None else to_best / max(equal, 1e-9),
        "our_validation_map": float(np.mean([max(p["map"] for p in row["validation_curve"]) for row in mine])),
        "other_at_our_seconds": float(np.mean([value_at(row["validation_curve"], "seconds", _mean(mine, "seconds"))
                                               for row in other])),
        "other_at_our_pairs": float(np.mean([value_at(row["validation_curve"], "pairs", _mean(mine, "pairs"))
                                             for row in other])),
    }


def first_reach(curve: Sequence[Row], target: float) -> Row | None:
    """The first point with at least ``target``, or None."""
    return next((point for point in curve if point["map"] >= target), None)


def value_at(curve: Sequence[Row], axis: str, spent: float) -> float:
    """The last value on the curve at which ``axis`` was not beyond ``spent``; the first one if all are."""
    within = [point for point in curve if point[axis] <= spent]
    return float((within or curve[:1])[-1]["map"])


def _at_cutoff(precisions: Precisions, report: HeadReport, cutoff: int, seed: int) -> dict[str, Any]:
    ceiling = report.best("ceiling")
    unlearned = {kind: [row for row in report.rows if row.kind == kind] for kind in ("raw", "direct")}
    if not unlearned["raw"]:
        raise LabelsNotUsable("a comparison needs at least one raw feature")
    trainers: dict[str, Any] = {}
    for name, found in precisions.items():
        values = found[cutoff]
        trainers[name] = {
            "map": float(values.mean()), "standard_error": float(values.std() / values.shape[0] ** 0.5),
            "share_of_ceiling": float(values.mean() / ceiling.result.mean) if ceiling else None,
            **{f"gain_over_{kind}": {row.name: gain_json(paired_bootstrap(values, row.result.per_query, seed=seed))
                                     for row in found_rows} for kind, found_rows in unlearned.items()},
        }  # fmt: skip
    return {
        "trainers": trainers,
        "baselines": {row.name: {"kind": row.kind, "map": row.result.mean,
                                 "standard_error": row.result.standard_error}
                      for row in report.rows if row.kind != "head"},
    }  # fmt: skip


def _mean(rows: Sequence[Row], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def draw(result: Mapping[str, Any], path: Path) -> bool:
    """Validation mAP over CPU seconds and over pairs, a line per run of those that are compared with each other.

    False where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 5.2), sharey=True)
    compared = result["comparisons"]
    names = list(dict.fromkeys([found["ours"] for found in compared] + [found["published"] for found in compared]))
    for number, name in enumerate(names):
        runs = [row for row in result["rows"] if row["trainer"] == name]
        for place, row in enumerate(runs):
            for axes, axis in ((left, "seconds"), (right, "pairs")):
                points = [(p[axis], p["map"]) for p in row["validation_curve"] if p[axis] > 0]
                if points:
                    axes.plot(*zip(*points, strict=True), color=f"C{number}", marker=".", alpha=0.8,
                              label=name if place == 0 else None)
    for axes, text in ((left, "CPU seconds of training"), (right, "pairs")):
        axes.set(xscale="log", xlabel=text)
        axes.grid(True, which="both", alpha=0.3)
    left.set_ylabel(f"validation mAP({result['map']['L']})")
    figure.tight_layout(rect=(0, 0.16, 1, 1))
    figure.legend(*left.get_legend_handles_labels(), loc="lower center", ncols=2, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True
