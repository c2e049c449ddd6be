"""Study *features*: do image, text and the generator's own features order items as the teacher does, before and after
a head is trained on them, and what is fusing them worth?

Why it exists: the first experiment the method asks for. Untuned features need no label; a head must beat the best of
them to be worth its labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from byline.evaluation.baselines import (
    combined_raw_scores,
    global_mean_rank_scores,
    prompt_neighbour_scores,
    raw_feature_scores,
)
from byline.evaluation.head_report import TEXT_FEATURES
from byline.evaluation.map import mean_average_precision
from byline.evaluation.study_bench import Bench, Cell, Fit
from byline.evaluation.study_data import JUDGE, LEARN
from byline.evaluation.study_report import bars, gain, number, sentence, table
from byline.ranker.labelled_set import LabelledSet

NAME = "features"
TITLE = "Features: image, text and the generator's own, untuned and tuned"


def measure(bench: Bench) -> dict[str, Any]:
    """Rows: untuned and tuned cells of every single encoder, some pairs and all of them; baselines and the ceiling."""
    names = bench.data.encoders
    subsets = [s for size in range(1, len(names) + 1) for s in combinations(names, size)]
    untuned = {s: bench.cell("+".join(s), _raw(bench, s)) for s in subsets}
    tuned = {s: bench.fitted("+".join(s), Fit(bench.student, s)) for s in subsets}
    singles = [s for s in subsets if len(s) == 1]
    # What the others are compared with is chosen on the validation queries, not on those that judge.
    known = {s: _validated(bench, s) for s in subsets}
    best_single = {"untuned": max(singles, key=lambda s: known[s]),
                   "tuned": max(singles, key=lambda s: tuned[s].fact("validation_map"))}  # fmt: skip
    best_raw = untuned[max(subsets, key=lambda s: known[s])]
    rows = []
    for subset in subsets:
        for kind, cells in (("untuned", untuned), ("tuned", tuned)):
            row = cells[subset].to_json() | {"kind": kind, "encoders": list(subset)}
            row["over_best_single"] = {m: gain(cells[subset].minus(cells[best_single[kind]], m)) for m in maps(bench)}
            if kind == "tuned":
                row["over_best_untuned"] = {m: gain(cells[subset].minus(best_raw, m)) for m in maps(bench)}
            rows.append(row)
    rows += [c.to_json() | {"kind": kind, "encoders": []} for kind, c in baselines(bench)]
    return {"rows": rows, "measures": list(maps(bench)), "main": _main(bench), "all": list(names),
            "best_single": {k: list(s) for k, s in best_single.items()}, "best_untuned": best_raw.name,
            "queries": len(bench.held_out.tau)}  # fmt: skip


def maps(bench: Bench) -> tuple[str, ...]:
    """Names of the mAP measures."""
    return tuple(f"map{cut}" for cut in bench.size.cutoffs)


def baselines(bench: Bench) -> list[tuple[str, Cell]]:
    """What looks at no image, and the teacher's other noise half."""
    data, held_out = bench.data, bench.held_out
    train = data.labelled(data.rows("train"), LEARN)
    found = [("no image", bench.cell("global mean rank", global_mean_rank_scores(train, held_out.queries)))]
    found += [("no image", bench.cell("per-caption mean rank", scores)) for scores in caption_scores(bench, train)]
    other = data.labelled(data.rows("test"), LEARN)
    if data.disjoint:
        found.append(("ceiling", bench.cell("teacher's other noise half", other.tau)))
    return found


def caption_scores(bench: Bench, train: LabelledSet) -> list[Any]:
    """Mean ranks over training queries of like prompts, [q, n]; none without a text encoder."""
    data = bench.data
    text = [name for name in data.encoders if name in TEXT_FEATURES]
    if not text:
        return []
    columns = data.columns(text[:1])
    asked = data.labelled(data.rows("test"), JUDGE, text[:1])
    return [prompt_neighbour_scores(train, train.query_features[:, columns], asked.query_features)]


def _main(bench: Bench) -> str:
    return maps(bench)[len(bench.size.cutoffs) // 2]


def _validated(bench: Bench, encoders: tuple[str, ...]) -> float:
    """mAP of the untuned order on the validation queries."""
    asked = bench.data.labelled(bench.data.rows("validation"), JUDGE)
    return mean_average_precision(_raw(bench, encoders, "validation"), asked.tau, bench.student.evaluate_at).mean


def _raw(bench: Bench, encoders: tuple[str, ...], split: str = "test") -> Any:
    """Mean cosine of the encoders, standardised; queries centred by the training queries' mean."""
    data, train = bench.data, bench.data.rows("train")
    parts = []
    for name in encoders:
        asked = data.labelled(data.rows(split), JUDGE, (name,))
        mean = data.query_features[train][:, data.columns((name,))].mean(0)
        parts.append(raw_feature_scores(asked.query_features, asked.item_features, query_mean=mean))
    return combined_raw_scores(parts)


def markdown(found: Mapping[str, Any]) -> str:
    """Findings in words, and the table."""
    main, rows = found["main"], found["rows"]
    whole = {r["kind"]: r for r in rows if r["encoders"] == found["all"]}
    best = found["best_single"].items()
    single = {k: next(r for r in rows if r["kind"] == k and r["encoders"] == s) for k, s in best}
    lines = []
    for kind in ("untuned", "tuned"):
        lines.append(sentence(
            f"{kind.capitalize()}, all encoders together", f"the best single one ({single[kind]['name']})",
            whole[kind]["over_best_single"][main], main,
        ))  # fmt: skip
    lines.append(sentence("The head on all encoders", f"the best untuned order ({found['best_untuned']})",
                          whole["tuned"]["over_best_untuned"][main], main))
    cells = [[r["name"], r["kind"], *(number(r[m]) for m in found["measures"]), number(r["top1"]), number(r["recall"])]
             for r in sorted(rows, key=lambda r: -r[main]["mean"])]  # fmt: skip
    return " ".join(lines) + "\n\n" + table(["features", "", *found["measures"], "top-1", "recall"], cells)


def draw(found: Mapping[str, Any], path: Path) -> bool:
    """Bars of the main measure, untuned beside tuned."""
    main = found["main"]
    subsets = [r["encoders"] for r in found["rows"] if r["kind"] == "tuned"]
    groups = {
        kind: [next(r[main] for r in found["rows"] if r["kind"] == kind and r["encoders"] == s) for s in subsets]
        for kind in ("untuned", "tuned")
    }
    lines = {r["name"]: r[main]["mean"] for r in found["rows"] if not r["encoders"]}
    return bars(["+\n".join(s) for s in subsets], groups, path, main, lines)
