"""Study *labels*: many queries with few candidates or few with many, and how many items from outside to call unrelated.

Why it exists: a label costs the teacher the same wherever it is spent. The published answer (more queries, fewer
candidates) is for one corpus and one loss; this is the same question of this corpus and our loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from byline.evaluation.study_bench import Bench, Fit
from byline.evaluation.study_features import baselines, maps
from byline.evaluation.study_report import curves, gain, number, sentence, table

NAME = "labels"
TITLE = "Labels: queries × candidates at one budget, and the rate of outside negatives"


def measure(bench: Bench) -> dict[str, Any]:
    """``growth``: whole rankings of more and more queries; ``budget``: a fixed number of pairs, split differently, with
    uniform and with nearest candidates; ``negatives``: rates of outside negatives on pruned candidates."""
    data, size = bench.data, bench.size
    total, n = len(data.rows("train")), len(data.items)
    counts = sorted({max(2, round(share * total)) for share in size.query_shares})
    pairs = min(counts) * n
    measures = maps(bench)
    main = measures[len(measures) // 2]

    def row(name: str, fit: Fit, **facts: Any) -> tuple[Any, dict[str, Any]]:
        cell = bench.fitted(name, fit)
        return cell, cell.to_json() | facts

    base = Fit(bench.student, data.encoders)
    growth = [row(f"{q} whole rankings", replace(base, queries=_all(q, total)), queries=q, candidates=n)[1]
              for q in counts]  # fmt: skip
    budget = []
    few, _ = row("few", replace(base, queries=_all(counts[0], total)))
    for choice in ("uniform", "nearest"):
        for q in counts:
            candidates = pairs // q
            fit = replace(base, queries=_all(q, total), candidates=0 if candidates >= n else candidates,
                          choice=choice if candidates < n else "nearest")  # fmt: skip
            cell, found = row(f"{q} queries × {candidates} {choice}", fit, queries=q, candidates=candidates,
                              choice=choice)  # fmt: skip
            budget.append(found | {"over_few_queries": gain(cell.minus(few, main)) if q != counts[0] else None})
    grid = sorted({max(2, round(share * n)) for share in size.nearest})
    pruned = grid[len(grid) // 2]
    cells = {rate: row(f"negatives {rate:.0%}", replace(base, student=replace(bench.student, outside_share=rate),
                                                        candidates=pruned), rate=rate) for rate in size.negatives}
    none = cells[min(size.negatives)][0]
    negatives = [found | {"over_none": gain(cell.minus(none, main)) if rate else None}
                 for rate, (cell, found) in cells.items()]  # fmt: skip
    return {"growth": growth, "budget": budget, "negatives": negatives, "pairs": pairs, "pruned": pruned, "items": n,
            "train_queries": total, "measures": list(measures), "main": main,
            "baselines": [c.to_json() | {"kind": kind} for kind, c in baselines(bench)]}  # fmt: skip


def _all(count: int, total: int) -> int:
    """0 stands for all, so that the row is shared with other studies."""
    return 0 if count == total else count


def markdown(found: Mapping[str, Any]) -> str:
    """Findings in words, and one table."""
    main = found["main"]
    lines = [f"{found['pairs']} labelled pairs, spent on different numbers of queries."]
    for choice in ("uniform", "nearest"):
        most = max((r for r in found["budget"] if r["choice"] == choice), key=lambda r: r["queries"])
        least = min((r for r in found["budget"] if r["choice"] == choice), key=lambda r: r["queries"])
        if most["over_few_queries"]:
            lines.append(sentence(f"{most['queries']} queries × {most['candidates']} {choice} candidates",
                                  f"{least['queries']} queries × all", most["over_few_queries"], main))
    best = max(found["budget"], key=lambda r: r[main]["mean"])
    lines.append(f"Best of these: {best['queries']} queries × {best['candidates']} {best['choice']} candidates, "
                 f"{number(best[main])}.")
    for r in found["negatives"]:
        if r["over_none"]:
            lines.append(sentence(f"{r['rate']:.0%} outside negatives", "none", r["over_none"], main))
    rows = [[f"{r['queries']} × all", r] for r in found["growth"]]
    rows += [[f"{r['queries']} × {r['candidates']}, {r['choice']}", r] for r in found["budget"]]
    rows += [[f"{found['train_queries']} × {found['pruned']} nearest, negatives {r['rate']:.0%}", r]
             for r in found["negatives"]]  # fmt: skip
    rows += [[f"{r['name']} ({r['kind']})", r] for r in found["baselines"]]
    return " ".join(lines) + "\n\n" + table(
        ["queries × candidates", *found["measures"], "top-1", "recall"],
        [[name, *(number(r[m]) for m in found["measures"]), number(r["top1"]), number(r["recall"])]
         for name, r in rows],
    )  # fmt: skip


def draw(found: Mapping[str, Any], path: Path) -> bool:
    """mAP by queries (all candidates; one budget, two choices) and by negatives' rate."""
    main = found["main"]
    by_queries = {"all candidates": [(r["queries"], r[main]) for r in found["growth"]]}
    for choice in ("uniform", "nearest"):
        points = [(r["queries"], r[main]) for r in found["budget"] if r["choice"] == choice]
        by_queries[f"{found['pairs']} pairs, {choice}"] = points
    rates = {f"{found['pruned']} nearest": [(r["rate"], r[main]) for r in found["negatives"]]}
    panels = {"labels": by_queries, "outside negatives": rates}
    return curves(panels, path, {"labels": "training queries", "outside negatives": "rate"}, main)
