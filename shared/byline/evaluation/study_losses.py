"""Study *losses*: what each registered loss makes of the same head, and what serving the result costs.

Why it exists: published ablations compare losses on mAP alone, and one of theirs cannot be served by one inner product
at all. Every loss of ``ranker.losses`` is a row here without being named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from byline.evaluation.study_bench import Bench, Fit
from byline.evaluation.study_data import LEARN
from byline.evaluation.study_features import baselines, maps
from byline.evaluation.study_report import bars, gain, number, sentence, table
from byline.evaluation.study_student import fit_student
from byline.evaluation.study_timing import interleaved
from byline.index import build_index
from byline.ranker.losses import LOSSES

NAME = "losses"
TITLE = "Losses: the same head under every loss, and the cost of serving it"
#: The published ordinal form: ten bins of ranks, a tower for each of nine thresholds (method.md 5.5).
THRESHOLDS = 9
FloatArray = npt.NDArray[np.float32]


def measure(bench: Bench) -> dict[str, Any]:
    """A cell for every loss, the time of its fit, and p50 and p99 of serving one query."""
    encoders = bench.data.encoders
    cells = {n: bench.fitted(n, Fit(replace(bench.student, loss=n), encoders)) for n in sorted(LOSSES)}
    measures = maps(bench)
    main = measures[len(measures) // 2]
    best = max(cells.values(), key=lambda c: c.mean(main))
    serving = bench.row({"serving": sorted(LOSSES), "rounds": bench.size.timing_rounds}, lambda: _serving(bench))
    rows = []
    for name, cell in cells.items():
        ours = cells[bench.student.loss].minus(cell, main) if name != bench.student.loss else None
        rows.append(cell.to_json() | {"serving_ms": serving["ms"][name], "searchable": True,
                                      "ours_minus_this": ours and gain(ours)})  # fmt: skip
    return {"rows": rows, "measures": list(measures), "main": main, "best": best.name, "ours": bench.student.loss,
            "nine_towers_ms": serving["ms"]["nine towers"], "items": len(bench.data.items),
            "embedding": serving["width"], "thresholds": THRESHOLDS,
            "baselines": [c.to_json() | {"kind": kind} for kind, c in baselines(bench)]}  # fmt: skip


def _serving(bench: Bench) -> dict[str, Any]:
    """Head and exact search of one query's features, for each loss, and for nine towers. The cost depends on the shape
    of a head and not on its weights, so one step of training is enough."""
    data, encoders = bench.data, bench.data.encoders
    train = data.labelled(data.rows("train"), LEARN)
    validation = data.labelled(data.rows("validation"), LEARN)
    asked = bench.held_out.query_features
    calls: dict[str, Callable[[int], object]] = {}
    k = min(100, train.items)
    width = 0
    for name in sorted(LOSSES):
        settings = replace(bench.student, loss=name, max_steps=1)
        student = fit_student(train, validation, data.blocks_of(encoders), settings, bench.seed)
        vectors = student.item_vectors(train.item_features)
        index = build_index(train.item_ids, vectors)
        width = vectors.shape[1]

        def serve(turn: int, student: Any = student, index: Any = index) -> object:
            return index.search(student.query_vectors(asked[[turn % len(asked)]]), k)

        calls[name] = serve
    towers = [vectors] * THRESHOLDS

    def nine(turn: int) -> object:
        total = np.zeros(len(vectors), dtype=np.float32)
        for tower in towers:  # nine embeddings of the query, nine scans, sum of probabilities, then the top
            query = student.query_vectors(asked[[turn % len(asked)]])
            total += 1.0 / (1.0 + np.exp(-(tower @ query[0])))
        return np.argpartition(-total, k - 1)[:k]

    return {"ms": interleaved(calls | {"nine towers": nine}, bench.size.timing_rounds), "width": width}


def markdown(found: Mapping[str, Any]) -> str:
    """Findings in words, and the table."""
    main, ours = found["main"], found["ours"]
    lines = [sentence(f"`{ours}`", f"`{r['name']}`", r["ours_minus_this"], main)
             for r in found["rows"] if r["ours_minus_this"]]  # fmt: skip
    fast = min(r["serving_ms"]["p50"] for r in found["rows"])
    slow = max(r["serving_ms"]["p50"] for r in found["rows"])
    nine = found["nine_towers_ms"]["p50"]
    lines.append(
        f"Every registered loss is served by one head and one search of {found['items']} items: p50 {fast:.2f} to "
        f"{slow:.2f} ms. The published ordinal form, {found['thresholds']} towers, takes {nine:.2f} ms "
        f"({nine / fast:.1f} times) and no index can search it."
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
