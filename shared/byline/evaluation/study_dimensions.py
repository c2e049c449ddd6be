"""Study *dimensions*: how narrow an embedding may be, and how coarsely it may be stored.

Why it exists: bytes per item and search time are the price of every item for ever. Three ways to a narrow embedding
stand side by side: a head fitted for the width, the best linear reduction of the widest head's vectors (no new fit,
serves the same inner product), and the leading part of a nested head where the head offers one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from byline.evaluation.study_bench import Bench, Cell, Fit, cell_of
from byline.evaluation.study_features import baselines, maps
from byline.evaluation.study_report import curves, gain, number, sentence, table
from byline.evaluation.study_student import Student, nested_vectors
from byline.evaluation.study_tiers import SERVED, STORAGES, full_scores, served, stored
from byline.evaluation.study_timing import interleaved

NAME = "dimensions"
TITLE = "Dimensions: width and quantisation of the embedding"

FloatArray = npt.NDArray[np.float32]


def measure(bench: Bench) -> dict[str, Any]:
    """A row for every width, way to it and storage; ``served``: time of one search at scale in the index's tiers."""
    widths = sorted(set(bench.size.dimensions), reverse=True)
    tiers = list(STORAGES)
    measures = maps(bench)
    main = measures[len(measures) // 2]
    cells: dict[tuple[str, int, str], Cell] = {}
    sizes: dict[tuple[str, int, str], dict[str, float]] = {}
    for width in widths:
        found = [bench.row({"dimensions": width, "of": widths[0], "tiers": tiers, "student": bench.student.facts(),
                            "seed": seed}, lambda w=width, s=seed: _row(bench, w, widths[0], s))  # type: ignore[misc]
                 for seed in bench.seeds]  # fmt: skip
        bench.report("dimensions", len(widths) - widths.index(width), len(widths))
        for way in found[0]["ways"]:
            for tier in tiers:
                rows = [{"judged": r["ways"][way][tier]["judged"], "facts_of_fit": {}} for r in found]
                cells[way, width, tier] = cell_of(f"{way} {width} {tier}", rows)
                sizes[way, width, tier] = found[0]["ways"][way][tier]["stored"]
    timing = {
        w: bench.row({"timing": w, "of": [tiers, SERVED], "n": bench.size.timing_items,
                      "rounds": bench.size.timing_rounds}, lambda w=w: _timing(bench, w))  # type: ignore[misc]
        for w in widths
    }  # fmt: skip
    reference = cells["separate", widths[0], tiers[0]]
    rows_out = [
        cell.to_json() | sizes[key] | {
            "way": key[0], "dimensions": key[1], "tier": key[2], "search_ms": timing[key[1]]["ms"][key[2]],
            "minus_widest": gain(cell.minus(reference, main)) if cell is not reference else None,
        }
        for key, cell in cells.items()
    ]  # fmt: skip
    at_scale = [{"dimensions": w, "tier": tier, **timing[w]["bytes"][tier], **timing[w]["served"][tier]}
                for w in widths for tier in SERVED]  # fmt: skip
    return {"rows": rows_out, "served": at_scale, "measures": list(measures), "main": main,
            "timing_items": bench.size.timing_items, "items": len(bench.data.items), "tiers": tiers,
            "widest": widths[0],
            "baselines": [c.to_json() | {"kind": kind} for kind, c in baselines(bench)]}  # fmt: skip


def _row(bench: Bench, width: int, widest: int, seed: int) -> dict[str, Any]:
    """All ways to a width, judged under each tier."""
    data, encoders = bench.data, bench.data.encoders
    own = bench.fit(Fit(replace(bench.student, out_dim=width), encoders), seed)
    ways = {"separate": _vectors(bench, own)}
    wide = own if width == widest else bench.fit(Fit(replace(bench.student, out_dim=widest), encoders), seed)
    if width < widest:
        train = wide.query_vectors(data.query_features[data.rows("train")])
        reduce_queries, reduce_items = reduction(train, _vectors(bench, wide)[1], width)
        queries, items = _vectors(bench, wide)
        ways["reduced"] = (queries @ reduce_queries, items @ reduce_items)
    nested = nested_vectors(wide, bench.held_out.query_features, data.item_features, width)
    if nested is not None:
        ways["nested"] = nested
    return {"ways": {way: {s: _judged(bench, s, *vectors) for s in STORAGES} for way, vectors in ways.items()}}


def _vectors(bench: Bench, student: Student) -> tuple[FloatArray, FloatArray]:
    return student.query_vectors(bench.held_out.query_features), student.item_vectors(bench.data.item_features)


def _judged(bench: Bench, storage: str, queries: FloatArray, items: FloatArray) -> dict[str, Any]:
    """The order the codes give, judged; and what they take."""
    index = stored(storage, items)
    return {"judged": bench.judge(full_scores(index, queries), bench.held_out.tau),
            "stored": {"bytes_per_item": float(index.sa_code_size())}}  # fmt: skip


def reduction(queries: FloatArray, items: FloatArray, width: int) -> tuple[FloatArray, FloatArray]:
    """Maps [D, width] of queries and of items whose product keeps inner products of the two best in least squares.

    With C_q and C_i the second moments, C_q^1/2 C_i^1/2 = U S W^T cut to ``width`` (a little of the identity is added
    to C_q: there are fewer queries than dimensions).
    """
    moments = []
    for rows, ridge in ((queries, 1e-3), (items, 1e-6)):
        moment = rows.astype(np.float64).T @ rows / len(rows)
        moment += ridge * np.trace(moment) / len(moment) * np.eye(len(moment))
        values, vectors = np.linalg.eigh(moment)
        moments.append(((vectors * np.sqrt(values)) @ vectors.T, (vectors / np.sqrt(values)) @ vectors.T))
    (root_q, back_q), (root_i, back_i) = moments
    left, strength, right = np.linalg.svd(root_q @ root_i)
    scale = np.sqrt(strength[:width])
    maps = (back_q @ left[:, :width]) * scale, (back_i @ right[:width].T) * scale
    return maps[0].astype(np.float32), maps[1].astype(np.float32)


def _timing(bench: Bench, width: int) -> dict[str, Any]:
    """p50 and p99 of one search by storage and by served tier, among random unit vectors of the width and one more (the
    prior's): for time only."""
    count = bench.size.timing_items
    rng = np.random.default_rng([bench.seed, width])
    vectors = rng.standard_normal((count, width + 1), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    asked = vectors[rng.integers(0, count, 64)] + np.float32(0.1)
    k = min(100, count)
    bare = {name: stored(name, vectors) for name in STORAGES}
    tiers = {factory: served(factory, vectors) for factory in SERVED}

    def search(index: Any) -> Callable[[int], object]:
        return lambda turn: index.search(asked[[turn % len(asked)]], k)

    calls = {("bare", n): search(i) for n, i in bare.items()} | {("served", n): search(i) for n, i in tiers.items()}
    spent = interleaved({f"{kind} {name}": call for (kind, name), call in calls.items()}, bench.size.timing_rounds)
    return {"ms": {n: spent[f"bare {n}"] for n in bare}, "served": {n: spent[f"served {n}"] for n in tiers},
            "bytes": {n: {"bytes_per_item": i.stats.bytes_per_item,
                          "stored_bytes_per_item": i.stats.stored_bytes_per_item}
                      for n, i in tiers.items()}}  # fmt: skip


def markdown(found: Mapping[str, Any]) -> str:
    """Findings in words, and the table."""
    main, exact = found["main"], found["tiers"][0]
    rows = found["rows"]
    lines = []
    for way in dict.fromkeys(r["way"] for r in rows):
        lines += [sentence(f"{r['dimensions']} dimensions, {way}", f"{found['widest']}", r["minus_widest"], main)
                  for r in rows if r["way"] == way and r["tier"] == exact and r["minus_widest"]]  # fmt: skip
    for tier in found["tiers"][1:]:
        pairs = [(r, next(e for e in rows if e["tier"] == exact and (e["way"], e["dimensions"]) ==
                          (r["way"], r["dimensions"]))) for r in rows if r["tier"] == tier]  # fmt: skip
        worst = min((r[main]["mean"] - e[main]["mean"] for r, e in pairs), default=0.0)
        size = np.mean([e["bytes_per_item"] / r["bytes_per_item"] for r, e in pairs])
        lines.append(f"{tier} codes take {size:.1f} times less than {exact}; {main} moves by {worst:+.4f} at worst.")
    cells = [[str(r["dimensions"]), r["way"], r["tier"], *(number(r[m]) for m in found["measures"]),
              f"{r['bytes_per_item']:.0f}", f"{r['search_ms']['p50']:.2f} / {r['search_ms']['p99']:.2f}"]
             for r in sorted(rows, key=lambda r: (-r["dimensions"], r["way"], r["tier"]))]  # fmt: skip
    cells += [["", r["name"], r["kind"], *(number(r[m]) for m in found["measures"]), "", ""]
              for r in found["baselines"]]  # fmt: skip
    head = ["width", "way", "storage", *found["measures"], "bytes an item",
            f"search of {found['timing_items']:,} p50 / p99, ms"]  # fmt: skip
    scale = [[str(r["dimensions"]), f"`{r['tier']}`", f"{r['bytes_per_item']:.0f}", f"{r['stored_bytes_per_item']:.0f}",
              f"{r['p50']:.2f} / {r['p99']:.2f}"] for r in found["served"]]  # fmt: skip
    two = table(["width", "tier as served", "bytes an item in memory", "on disk",
                 f"search of {found['timing_items']:,} p50 / p99, ms"], scale)  # fmt: skip
    return " ".join(lines) + f"\n\n{table(head, cells)}\n\n{two}"


def draw(found: Mapping[str, Any], path: Path) -> bool:
    """mAP by width for each way and tier, and search time by width."""
    quality: dict[str, list[Any]] = {}
    speed: dict[str, list[Any]] = {}
    for r in found["rows"]:
        quality.setdefault(f"{r['way']}, {r['tier']}", []).append((r["dimensions"], r[found["main"]]))
        if r["way"] == "separate":
            speed.setdefault(r["tier"], []).append((r["dimensions"], r["search_ms"]["p50"]))
    panels = {found["main"]: quality, f"p50 of a search of {found['timing_items']:,}, ms": speed}
    return curves(panels, path, {t: "dimensions" for t in panels}, "")
