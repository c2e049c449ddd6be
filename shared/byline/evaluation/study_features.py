"""Study *features*: do image, text and the generator's own features order items as the teacher does, before and after
a head is trained on them, and what is fusing them worth?

Why it exists: the first experiment the method asks for. Untuned features need no label; a head must beat the best of
them to be worth its labels, and a fused one the best of its parts. An encoder of ``ranker.head.DIRECT`` is used
untuned as what it is, an inner product, and as a cosine too, to show what the habit costs.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from byline.ranker.head import DIRECT
from byline.ranker.labelled_set import LabelledSet

NAME = "features"
TITLE = "Features: image, text and the generator's own, untuned and tuned"


def measure(bench: Bench) -> dict[str, Any]:
    """Rows: untuned and tuned cells of every single encoder and of ``StudySize.fused``; baselines and the ceiling."""
    singles = [(name,) for name in bench.data.encoders]
    subsets = [*singles, *bench.size.fused]
    untuned = {s: bench.cell("+".join(s), untuned_scores(bench, s)) for s in subsets}
    tuned = {s: bench.fitted("+".join(s), Fit(bench.student, s)) for s in subsets}
    # What the others are compared with is chosen on the validation queries, not on those that judge.
    known = {
        "untuned": {s: _validated(bench, s) for s in subsets},
        "tuned": {s: tuned[s].fact("validation_map") for s in subsets},
    }
    best_raw = untuned[max(subsets, key=lambda s: known["untuned"][s])]
    rows = []
    for subset in subsets:
        for kind, cells in (("untuned", untuned), ("tuned", tuned)):
            row = cells[subset].to_json() | {"kind": kind, "encoders": list(subset)}
            if len(subset) > 1:
                part = max(((n,) for n in subset), key=lambda s: known[kind][s])
                row["best_part"] = part[0]
                row["over_best_part"] = {m: gain(cells[subset].minus(cells[part], m)) for m in maps(bench)}
            if kind == "tuned":
                row["over_untuned"] = {m: gain(cells[subset].minus(untuned[subset], m)) for m in maps(bench)}
                row["over_best_untuned"] = {m: gain(cells[subset].minus(best_raw, m)) for m in maps(bench)}
            rows.append(row)
    for name in (n for n in bench.data.encoders if n in DIRECT):
        naive = bench.cell(f"{name} by standardised cosine", cosine_scores(bench, (name,)))
        over = {m: gain(untuned[(name,)].minus(naive, m)) for m in maps(bench)}
        rows.append(naive.to_json() | {"kind": "untuned", "encoders": [], "of": name, "product_over_this": over})
    rows += [c.to_json() | {"kind": kind, "encoders": []} for kind, c in baselines(bench)]
    return {"rows": rows, "measures": list(maps(bench)), "main": _main(bench), "served": list(bench.size.served),
            "best_untuned": best_raw.name, "queries": len(bench.held_out.tau),
            "served_over_network": gain(tuned[bench.size.served].minus(tuned[bench.size.network], _main(bench))),
            "network": list(bench.size.network)}  # fmt: skip


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
    scores = untuned_scores(bench, encoders, "validation")
    return mean_average_precision(scores, asked.tau, bench.student.evaluate_at).mean


def untuned_scores(bench: Bench, encoders: tuple[str, ...], split: str = "test") -> Any:
    """The inner product of an encoder of ``DIRECT`` by itself; for all else the mean of standardised cosines."""
    if len(encoders) == 1 and encoders[0] in DIRECT:
        return bench.nearness(bench.data.rows(split), encoders)
    return cosine_scores(bench, encoders, split)


def cosine_scores(bench: Bench, encoders: tuple[str, ...], split: str = "test") -> Any:
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
    at = {(r["kind"], tuple(r["encoders"])): r for r in rows if r["encoders"]}
    lines = []
    for kind in ("untuned", "tuned"):
        lines += [sentence(f"{kind.capitalize()} {r['name']}", f"its best part ({r['best_part']})",
                           r["over_best_part"][main], main)
                  for r in rows if r["kind"] == kind and "over_best_part" in r]  # fmt: skip
    lines += [sentence(f"The inner product of untuned `{r['of']}`", "its standardised cosine",
                       r["product_over_this"][main], main) for r in rows if "product_over_this" in r]  # fmt: skip
    served = at["tuned", tuple(found["served"])]
    lines.append(sentence(f"The head that is served ({served['name']})",
                          f"the best untuned order ({found['best_untuned']})", served["over_best_untuned"][main], main))
    network = "+".join(found["network"])
    lines.append(sentence(served["name"], f"the head of the other studies that does not see the gradient ({network})",
                          found["served_over_network"], main))
    cells = []
    for r in sorted(rows, key=lambda r: -r[main]["mean"]):
        over = r.get("over_best_part")
        cells.append([r["name"], r["kind"], *(number(r[m]) for m in found["measures"]), number(r["top1"]),
                      number(r["recall"]),
                      f"{over[main]['mean']:+.3f} ({r['best_part']})" if over else ""])  # fmt: skip
    return " ".join(lines) + "\n\n" + table(
        ["features", "", *found["measures"], "top-1", "recall", f"{main} over its best part"], cells)


def draw(found: Mapping[str, Any], path: Path) -> bool:
    """Bars of the main measure, untuned beside tuned."""
    main = found["main"]
    subsets = [r["encoders"] for r in found["rows"] if r["kind"] == "tuned"]
    groups = {
        kind: [next(r[main] for r in found["rows"] if r["kind"] == kind and r["encoders"] == s) for s in subsets]
        for kind in ("untuned", "tuned")
    }
    lines = {r["name"]: r[main]["mean"] for r in found["rows"] if not r["encoders"] and "of" not in r}
    return bars(["+\n".join(s) for s in subsets], groups, path, main, lines)
