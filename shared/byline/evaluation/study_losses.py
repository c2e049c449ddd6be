"""Study *losses*: what each registered loss makes of the same head, and what serving the result costs.

Why it exists: published ablations compare losses on mAP alone, and one of theirs cannot be served by one inner product
at all. Every loss of ``ranker.losses`` is a row here without being named.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from byline.evaluation.published_ordinal import OrdinalFit, fit_published_ordinal
from byline.evaluation.study_bench import Bench, Fit, cell_of
from byline.evaluation.study_data import LEARN
from byline.evaluation.study_features import baselines, maps
from byline.evaluation.study_report import bars, gain, number, sentence, table
from byline.evaluation.study_student import fit_student
from byline.evaluation.study_timing import interleaved
from byline.index import build_index
from byline.ranker.fit import FitConfig
from byline.ranker.labelled_set import LabelledSet
from byline.ranker.losses import LOSSES

NAME = "losses"
TITLE = "Losses: the same head under every loss, and the cost of serving it"
#: The published ordinal form: ten bins of ranks, an embedding for each of nine thresholds (method.md 5.5).
NINE = "ordinal, nine embeddings"


def measure(bench: Bench) -> dict[str, Any]:
    """A cell for every loss, the time of its fit, and p50 and p99 of serving one query."""
    encoders = bench.size.network
    cells = {n: bench.fitted(n, Fit(replace(bench.student, loss=n), encoders)) for n in sorted(LOSSES)}
    nine = []
    for number_, seed in enumerate(bench.seeds):
        bench.report(f"head: {NINE}", number_, len(bench.seeds))
        key = {"nine towers": bench.student.facts(), "encoders": encoders, "seed": seed}
        nine.append(bench.row(key, lambda s=seed: _nine_row(bench, s)))  # type: ignore[misc]
    cells[NINE] = cell_of(NINE, nine)
    measures = maps(bench)
    main = measures[len(measures) // 2]
    best = max(cells.values(), key=lambda c: c.mean(main))
    serving = bench.row({"serving": sorted(LOSSES), "encoders": encoders, "rounds": bench.size.timing_rounds},
                        lambda: _serving(bench))  # fmt: skip
    rows = []
    for name, cell in cells.items():
        ours = cells[bench.student.loss].minus(cell, main) if name != bench.student.loss else None
        rows.append(cell.to_json() | {"serving_ms": serving["ms"][name], "searchable": name != NINE,
                                      "ours_minus_this": ours and gain(ours)})  # fmt: skip
    return {"rows": rows, "measures": list(measures), "main": main, "best": best.name, "ours": bench.student.loss,
            "items": len(bench.data.items), "embedding": serving["width"], "encoders": list(encoders), "nine": NINE,
            "baselines": [c.to_json() | {"kind": kind} for kind, c in baselines(bench)]}  # fmt: skip


def _nine(bench: Bench, seed: int, steps: int) -> tuple[OrdinalFit, LabelledSet]:
    """The published ordinal form with our hidden layers, batches and ``steps``; and what it learnt from."""
    encoders, student = bench.size.network, bench.student
    train = bench.data.labelled(bench.data.rows("train"), LEARN, encoders)
    fit = FitConfig(max_steps=steps, outside_share=student.outside_share, evaluate_at=student.evaluate_at,
                    evaluate_every=max(1, min(20, steps // 4)))  # fmt: skip
    return fit_published_ordinal(train, bench.validation_set(encoders), fit, seed, hidden=student.hidden,
                                 out_dim=student.out_dim), train  # fmt: skip


def _nine_row(bench: Bench, seed: int) -> dict[str, Any]:
    started = time.monotonic()
    fitted, _ = _nine(bench, seed, bench.student.max_steps)
    held_out = bench.test_set(bench.size.network)
    scores = fitted.head.scores(held_out.query_features, held_out.item_features)
    return {"judged": bench.judge(scores, held_out.tau),
            "facts_of_fit": {"fit_seconds": round(time.monotonic() - started, 2),
                             "validation_map": fitted.best_map}}  # fmt: skip


def _serving(bench: Bench) -> dict[str, Any]:
    """Head and exact search of one query's features, for each loss. The cost depends on the shape of a head and not on
    its weights, so one step of training is enough. The nine embeddings have no index: all items, nine times."""
    data, encoders = bench.data, bench.size.network
    train, validation = data.labelled(data.rows("train"), LEARN, encoders), bench.validation_set(encoders)
    asked = bench.test_set(encoders).query_features
    calls: dict[str, Callable[[int], object]] = {}
    k = min(100, train.items)
    width = 0
    for name in sorted(LOSSES):
        settings = replace(bench.student, loss=name, max_steps=1)
        student = fit_student(train, validation, data.blocks_of(encoders), settings, bench.seed)
        vectors = student.item_vectors(train.item_features)
        index = build_index(train.item_ids, vectors, "Flat")
        width = vectors.shape[1]

        def serve(turn: int, student: Any = student, index: Any = index) -> object:
            return index.search(student.query_vectors(asked[[turn % len(asked)]]), k)

        calls[name] = serve
    head = _nine(bench, bench.seed, 1)[0].head.eval()
    with torch.no_grad():
        towers = head.embed(torch.from_numpy(train.item_features), queries=False).transpose(1, 2).contiguous()

    def nine(turn: int) -> object:
        with torch.no_grad():
            query = head.embed(torch.from_numpy(asked[[turn % len(asked)]]), queries=True)
            slopes = -functional.softplus(head.raw_slopes)[:, None, None]
            beyond = torch.sigmoid(slopes * (query @ towers) + head.biases[:, None, None]).sum(0)
            return torch.topk(-beyond, k)

    return {"ms": interleaved(calls | {NINE: nine}, bench.size.timing_rounds), "width": width}


def markdown(found: Mapping[str, Any]) -> str:
    """Findings in words, and the table."""
    main, ours = found["main"], found["ours"]
    lines = [sentence(f"`{ours}`", f"`{r['name']}`", r["ours_minus_this"], main)
             for r in found["rows"] if r["ours_minus_this"]]  # fmt: skip
    searched = [r for r in found["rows"] if r["searchable"]]
    fast = min(r["serving_ms"]["p50"] for r in searched)
    slow = max(r["serving_ms"]["p50"] for r in searched)
    nine = next(r for r in found["rows"] if not r["searchable"])["serving_ms"]["p50"]
    lines.append(
        f"Every registered loss is served by one head and one search of {found['items']} items: p50 {fast:.2f} to "
        f"{slow:.2f} ms. The published ordinal form takes {nine:.2f} ms ({nine / slow:.1f} times the slowest of them) "
        f"and no index can search it."
    )
    cells = [[f"`{r['name']}`", *(number(r[m]) for m in found["measures"]), number(r["top1"]), number(r["recall"]),
              f"{r['fit_seconds']:.0f}", f"{r['serving_ms']['p50']:.2f} / {r['serving_ms']['p99']:.2f}"]
             for r in sorted(found["rows"], key=lambda r: -r[main]["mean"])]  # fmt: skip
    cells += [[f"{r['name']} ({r['kind']})", *(number(r[m]) for m in found["measures"]), number(r["top1"]),
               number(r["recall"]), "", ""] for r in found["baselines"]]  # fmt: skip
    return " ".join(lines) + "\n\n" + table(
        ["loss", *found["measures"], "top-1", "recall", "fit, s", "serving p50 / p99, ms"], cells)


def draw(found: Mapping[str, Any], path: Path) -> bool:
    """Bars of every mAP by loss."""
    names = [r["name"] for r in found["rows"]]
    groups = {m: [r[m] for r in found["rows"]] for m in found["measures"]}
    return bars(names, groups, path, "mAP")
