"""Study *pruning*: what is lost when the teacher only scores the K items nearest by raw features.

Why it exists: curation at scale cannot score everything, and the published work has one K and no recall curve. Here the
whole corpus is ranked, so recall of the teacher's top inside the K nearest is known, heads can be trained on each K,
and the random exploration share can be seen at work: as training data, and as an estimate of what pruning misses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from byline.evaluation.agreement import Figure
from byline.evaluation.recall import recall_at
from byline.evaluation.study_bench import Bench, Fit, choose
from byline.evaluation.study_data import JUDGE
from byline.evaluation.study_features import baselines, maps
from byline.evaluation.study_report import curves, gain, number, sentence, start, table
from byline.ranker.labelled_set import influence_ranks

NAME = "pruning"
TITLE = "Pruning: the teacher's top inside the K nearest, and heads trained on K candidates"


def measure(bench: Bench) -> dict[str, Any]:
    """``recall`` by feature and K over all queries; ``heads`` by encoders, K and explored share; ``estimates`` of the
    miss."""
    data, size = bench.data, bench.size
    n = len(data.items)
    grid = sorted({max(2, round(share * n)) for share in size.nearest})
    top = size.cutoffs[len(size.cutoffs) // 2]
    measures = maps(bench)
    main = measures[len(measures) // 2]
    every = np.arange(len(data.queries))
    tau = data.tau[JUDGE]
    recall = []
    for encoders in (*((name,) for name in data.encoders), size.network):
        near = bench.nearness(every, encoders)
        for k in [*grid, min(n, 2 * grid[-1])]:
            figure = Figure.of(recall_at(near, tau, top, k).tolist())
            recall.append({"feature": "+".join(encoders), "k": k, "share": k / n, "mean": figure.mean,
                           "error": figure.standard_error})  # fmt: skip
    heads = [row for name, base in bench.arms.items() for row in _heads(bench, name, base, main)]
    return {"recall": recall, "heads": heads, "estimates": _estimates(bench, grid, top), "top": top, "items": n,
            "main": main, "measures": list(measures), "estimated_by": list(size.network),
            "baselines": [c.to_json() | {"kind": kind} for kind, c in baselines(bench)]}  # fmt: skip


def _heads(bench: Bench, name: str, base: Fit, main: str) -> list[dict[str, Any]]:
    """Heads on all items first, then on K candidates that the same encoders choose."""
    n = len(bench.data.items)
    whole = bench.fitted(f"{name}, all items", base)
    rows = [whole.to_json() | {"encoders": name, "k": n, "explored": 0.0, "whole_minus_this": None,
                               "over_unexplored": None}]  # fmt: skip
    for k in sorted({max(2, round(share * n)) for share in bench.size.candidates}):
        cells = {}
        for share in bench.size.exploration:
            fit = replace(base, candidates=k, explored=share)
            cells[share] = bench.fitted(f"{name}, K={k}, {share:.0%} explored", fit)
        for share, cell in cells.items():
            over = gain(cell.minus(cells[0.0], main)) if share and 0.0 in cells else None
            rows.append(cell.to_json() | {"encoders": name, "k": k, "explored": share, "over_unexplored": over,
                                          "whole_minus_this": gain(whole.minus(cell, main))})  # fmt: skip
    return rows


def _estimates(bench: Bench, grid: list[int], top: int) -> list[dict[str, float]]:
    """Share of the teacher's top outside the nearest, estimated from the explored items alone, beside the truth.

    An explored item stands for (all outside) / (explored) items; its rank in the whole corpus is taken as known, which
    curation, ranking candidates only, would have to estimate as well."""
    data, share = bench.data, max(bench.size.exploration)
    network = bench.size.network
    near = bench.nearness(np.arange(len(data.queries)), network)
    wanted = (influence_ranks(data.tau[JUDGE]) < top).astype(np.float64)
    found = []
    for k in grid:
        explored = round(k * share)
        if not explored:
            continue
        inner = choose(near, Fit(bench.student, network, candidates=k - explored), np.random.default_rng(0))
        both = choose(near, Fit(bench.student, network, candidates=k, explored=share),
                      np.random.default_rng([bench.seed, 3]))  # fmt: skip
        weight = (near.shape[1] - (k - explored)) / explored
        guess = Figure.of((((both & ~inner) * wanted).sum(1) * weight / top).tolist())
        truth = ((~inner) * wanted).sum(1) / top
        found.append({"k": k, "explored": explored, "estimate": guess.mean, "error": guess.standard_error,
                      "truth": float(truth.mean())})  # fmt: skip
    return found


def markdown(found: Mapping[str, Any]) -> str:
    """Findings in words, and two tables."""
    main, n = found["main"], found["items"]
    heads, lines = found["heads"], []
    for encoders in dict.fromkeys(r["encoders"] for r in heads):
        mine = [r for r in heads if r["encoders"] == encoders]
        lines += [sentence(f"{encoders}: all items", f"K = {r['k']} ({r['k'] / n:.1%})", r["whole_minus_this"], main)
                  for r in mine if r["whole_minus_this"] and r["explored"] == 0.0]  # fmt: skip
        gains = [r["over_unexplored"] for r in mine if r["over_unexplored"]]
        better, worse = sum(g["low"] > 0 for g in gains), sum(g["high"] < 0 for g in gains)
        lines.append(f"In place of as many near ones, explored candidates made this head better at {better} and worse "
                     f"at {worse} of {len(gains)} settings (interval clear of zero); mean change {_mean(gains):+.3f}.")
    lines += [f"At K = {e['k']} by {'+'.join(found['estimated_by'])} the {e['explored']} explored items estimate that "
              f"{e['estimate']:.3f} ± {e['error']:.3f} of the top {found['top']} lie outside the nearest; the truth is "
              f"{e['truth']:.3f}." for e in found["estimates"]]  # fmt: skip
    features = list(dict.fromkeys(r["feature"] for r in found["recall"]))
    ks = sorted({r["k"] for r in found["recall"]})
    at = {(r["feature"], r["k"]): r for r in found["recall"]}
    one = table([f"recall of the top {found['top']}", *(f"K = {k}" for k in ks)],
                [[f, *(number(at[f, k]) for k in ks)] for f in features])  # fmt: skip
    two = table(["head", "K", "explored", *found["measures"], "top-1", "recall"],
                [[r["encoders"] + start(r), str(r["k"]), f"{r['explored']:.0%}",
                  *(number(r[m]) for m in (*found["measures"], "top1", "recall"))] for r in heads]
                + [[r["name"], "", r["kind"], *(number(r[m]) for m in found["measures"]), number(r["top1"]),
                    number(r["recall"])] for r in found["baselines"]])  # fmt: skip
    return " ".join(lines) + f"\n\n{one}\n\n{two}"


def _mean(gains: list[dict[str, float]]) -> float:
    return float(np.mean([g["mean"] for g in gains])) if gains else 0.0


def draw(found: Mapping[str, Any], path: Path) -> bool:
    """Recall by K and feature, and mAP of the heads by K and explored share."""
    recall: dict[str, list[Any]] = {}
    for r in found["recall"]:
        recall.setdefault(r["feature"], []).append((r["k"], r))
    heads: dict[str, list[Any]] = {}
    for r in found["heads"]:
        if r["whole_minus_this"]:
            heads.setdefault(f"{r['encoders']}, {r['explored']:.0%} explored", []).append((r["k"], r[found["main"]]))
    panels = {f"recall of the teacher's top {found['top']}": recall, f"{found['main']} of the head": heads}
    levels = {f"{r['encoders']}, all items": r[found["main"]]["mean"] for r in found["heads"]
              if not r["whole_minus_this"]}  # fmt: skip
    return curves(panels, path, {t: "K nearest" for t in panels}, "", {title: levels for title in list(panels)[1:]},
                  log=True)  # fmt: skip
