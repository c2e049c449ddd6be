"""Study *labels*: many queries with few candidates or few with many, and how many items from outside to call unrelated.

Why it exists: a label costs the teacher the same wherever it is spent. The published answer (more queries, fewer
candidates) is for one corpus and one loss; this is the same question of this corpus and our loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from byline.evaluation.study_bench import Bench, Cell, Fit
from byline.evaluation.study_features import baselines, maps, untuned_scores
from byline.evaluation.study_report import curves, gain, number, sentence, start, table
from byline.ranker.head import DIRECT

NAME = "labels"
TITLE = "Labels: queries × candidates at one budget, and the rate of outside negatives"


def measure(bench: Bench) -> dict[str, Any]:
    """For every arm of the bench: ``growth``, whole rankings of more and more queries;
    ``budget``, a fixed number of pairs, split differently, with uniform and with nearest candidates; ``negatives``,
    rates of outside negatives on pruned candidates."""
    data, size = bench.data, bench.size
    total, n = len(data.rows("train")), len(data.items)
    measures = maps(bench)
    main = measures[len(measures) // 2]
    growth, budget, negatives = [], [], []
    for base in bench.arms.values():
        growth += _growth(bench, base, total, n)
        budget += _budget(bench, base, total, n, main)
        negatives += _negatives(bench, base, n, main)
    free = [bench.cell(f"{name}, no labels", untuned_scores(bench, (name,))).to_json()
            for name in size.served if name in DIRECT]  # fmt: skip
    counts = _counts(size.budget_shares, total)
    return {"growth": growth, "budget": budget, "negatives": negatives, "free": free, "pairs": min(counts) * n,
            "pruned": _pruned(bench, n), "items": n, "train_queries": total, "measures": list(measures), "main": main,
            "baselines": [c.to_json() | {"kind": kind} for kind, c in baselines(bench)]}  # fmt: skip


def _counts(shares: Sequence[float], total: int) -> list[int]:
    return sorted({max(2, round(share * total)) for share in shares})


def _pruned(bench: Bench, n: int) -> int:
    grid = sorted({max(2, round(share * n)) for share in bench.size.candidates})
    return grid[len(grid) // 2]


def _row(bench: Bench, what: str, fit: Fit, **facts: Any) -> tuple[Cell, dict[str, Any]]:
    name = f"{'+'.join(fit.encoders)}, {fit.student.loss}"
    cell = bench.fitted(f"{name}, {what}", fit)
    return cell, cell.to_json() | {"encoders": name} | facts


def _growth(bench: Bench, base: Fit, total: int, n: int) -> list[dict[str, Any]]:
    return [_row(bench, f"{q} whole rankings", replace(base, queries=_all(q, total)), queries=q, candidates=n)[1]
            for q in _counts(bench.size.query_shares, total)]  # fmt: skip


def _budget(bench: Bench, base: Fit, total: int, n: int, main: str) -> list[dict[str, Any]]:
    counts = _counts(bench.size.budget_shares, total)
    pairs, rows = min(counts) * n, []
    few, whole = _row(bench, "few", replace(base, queries=_all(counts[0], total)), queries=counts[0], candidates=n)
    for choice in ("uniform", "nearest"):
        rows.append(whole | {"choice": choice, "over_few_queries": None})
        for q in counts[1:]:
            fit = replace(base, queries=_all(q, total), candidates=pairs // q, choice=choice)
            cell, found = _row(bench, f"{q} queries × {pairs // q} {choice}", fit, queries=q, candidates=pairs // q,
                               choice=choice)  # fmt: skip
            rows.append(found | {"over_few_queries": gain(cell.minus(few, main))})
    return rows


def _negatives(bench: Bench, base: Fit, n: int, main: str) -> list[dict[str, Any]]:
    cells = {}
    for rate in sorted(bench.size.negatives):
        fit = replace(base, student=replace(base.student, outside_share=rate), candidates=_pruned(bench, n))
        cells[rate] = _row(bench, f"negatives {rate:.0%}", fit, rate=rate)
    none = cells[min(cells)][0]
    return [found | {"over_none": gain(cell.minus(none, main)) if cell is not none else None}
            for cell, found in cells.values()]  # fmt: skip


def _all(count: int, total: int) -> int:
    """0 stands for all, so that the row is shared with other studies."""
    return 0 if count == total else count


def markdown(found: Mapping[str, Any]) -> str:
    """Findings in words, and one table."""
    main = found["main"]
    lines = [f"{found['pairs']:,} labelled pairs, spent on different numbers of queries."]
    for encoders in dict.fromkeys(r["encoders"] for r in found["budget"]):
        mine = [r for r in found["budget"] if r["encoders"] == encoders]
        few = min(r["queries"] for r in mine)
        lines += [sentence(f"{encoders}: {r['queries']} queries × {r['candidates']} {r['choice']} candidates",
                           f"{few} × all", r["over_few_queries"], main)
                  for r in mine if r["over_few_queries"]]  # fmt: skip
        lines += [sentence(f"{encoders}: {r['rate']:.0%} outside negatives", "none", r["over_none"], main)
                  for r in found["negatives"] if r["encoders"] == encoders and r["over_none"]]  # fmt: skip
    rows = [[r["encoders"], f"{r['queries']} × all", r] for r in found["growth"]]
    rows += [[r["encoders"], f"{r['queries']} × {r['candidates']}, {r['choice']}", r] for r in found["budget"]
             if r["over_few_queries"]]  # fmt: skip
    rows += [[r["encoders"], f"{found['train_queries']} × {found['pruned']} nearest, negatives {r['rate']:.0%}", r]
             for r in found["negatives"]]  # fmt: skip
    rows += [[r["name"], "0", r] for r in found["free"]]
    rows += [[r["name"], r["kind"], r] for r in found["baselines"]]
    return " ".join(lines) + "\n\n" + table(
        ["head", "queries × candidates", *found["measures"], "top-1", "recall"],
        [[head + start(r), name, *(number(r[m]) for m in found["measures"]), number(r["top1"]), number(r["recall"])]
         for head, name, r in rows],
    )  # fmt: skip


def draw(found: Mapping[str, Any], path: Path) -> bool:
    """mAP by queries (all candidates; one budget, two choices) and by negatives' rate."""
    main = found["main"]
    by_queries: dict[str, list[Any]] = {}
    rates: dict[str, list[Any]] = {}
    for r in found["growth"]:
        by_queries.setdefault(f"{r['encoders']}, all candidates", []).append((r["queries"], r[main]))
    for r in found["budget"]:
        by_queries.setdefault(f"{r['encoders']}, {found['pairs']:,} pairs, {r['choice']}", []).append(
            (r["queries"], r[main]))
    for r in found["negatives"]:
        rates.setdefault(f"{r['encoders']}, {found['pruned']} nearest", []).append((r["rate"], r[main]))
    panels = {"labels": by_queries, "outside negatives": rates}
    levels = {"labels": {r["name"]: r[main]["mean"] for r in found["free"]}}
    return curves(panels, path, {"labels": "training queries", "outside negatives": "rate"}, main, levels)
