"""Study *dimensions*: how narrow an embedding may be, and how coarsely it may be stored.

Why it exists: bytes per item and search time are the price of every item for ever. Three ways to a narrow embedding
stand side by side: the leading columns of the widest head (``Head.narrowed``), the best linear reduction of its vectors
(both serve the same inner product without a new fit), and a network fitted for the width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from byline.evaluation.study_bench import Bench, Fit, cell_of
from byline.evaluation.study_data import LEARN
from byline.evaluation.study_features import baselines, maps
from byline.evaluation.study_report import curves, gain, number, sentence, table
from byline.evaluation.study_student import Student, narrowed
from byline.evaluation.study_tiers import SERVED, STORAGES, full_scores, served, stored
from byline.evaluation.study_timing import interleaved
from byline.ranker.head import DIRECT

NAME = "dimensions"
TITLE = "Dimensions: width and quantisation of the embedding"

FloatArray = npt.NDArray[np.float32]


def measure(bench: Bench) -> dict[str, Any]:
    """A row for every head, width, way to it and storage; ``served``: time of one search at scale in the index's
    tiers."""
    size = bench.size
    widths = sorted(set(size.dimensions), reverse=True)
    tiers = list(STORAGES)
    measures = maps(bench)
    main = measures[len(measures) // 2]
    found: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for seed in bench.seeds:
        for encoders in (size.served, size.network):
            key = {"dimensions": widths, "of": encoders, "tiers": tiers, "student": bench.student.facts(), "seed": seed}
            row = bench.row(key, lambda e=encoders, s=seed: _cuts(bench, e, widths, s))  # type: ignore[misc]
            for name, judged in row["cuts"].items():
                way, width = name.split()
                found.setdefault(("+".join(encoders), way, int(width)), []).append(judged)
        for width in size.separate:
            key = {"separate": width, "tiers": tiers, "student": bench.student.facts(), "seed": seed}
            row = bench.row(key, lambda w=width, s=seed: _separate(bench, w, s))  # type: ignore[misc]
            found.setdefault(("+".join(size.network), "separate", width), []).append(row["judged"])
    timing = {w: bench.row({"timing": w, "of": [tiers, SERVED], "n": size.timing_items, "rounds": size.timing_rounds},
                           lambda w=w: _timing(bench, w)) for w in widths}  # type: ignore[misc]  # fmt: skip
    cells = {(*key, tier): cell_of(" ".join(map(str, key)), [{"judged": r[tier]["judged"], "facts_of_fit": {}}
                                                             for r in rows])
             for key, rows in found.items() for tier in tiers}  # fmt: skip
    widest = {head: max(w for h, way, w in found if h == head and way == "nested") for head, _, _ in found}
    rows_out = []
    for (head, way, width, tier), cell in cells.items():
        whole = cells[head, "nested", widest[head], tiers[0]]
        rows_out.append(cell.to_json() | found[head, way, width][0][tier]["stored"] | {
            "head": head, "way": way, "dimensions": width, "tier": tier,
            "search_ms": timing[width]["ms"][tier] if width in timing else None,
            "minus_widest": gain(cell.minus(whole, main)) if cell is not whole else None,
        })  # fmt: skip
    at_scale = [{"dimensions": w, "tier": tier, **timing[w]["bytes"][tier], **timing[w]["served"][tier]}
                for w in widths for tier in SERVED]  # fmt: skip
    return {"rows": rows_out, "served": at_scale, "measures": list(measures), "main": main,
            "timing_items": size.timing_items, "items": len(bench.data.items), "tiers": tiers, "widest": widest,
            "baselines": [c.to_json() | {"kind": kind} for kind, c in baselines(bench)]}  # fmt: skip


def _cuts(bench: Bench, encoders: tuple[str, ...], widths: Sequence[int], seed: int) -> dict[str, Any]:
    """One head and its narrower forms, judged under each storage: {"way width": {storage: ...}}.

    A head without a direct part is fitted as wide as the widest asked for, one with it has its own width."""
    student = bench.student
    if not set(encoders) & DIRECT:
        student = replace(student, out_dim=max(widths) - 1)  # the item prior is one more
    whole = bench.fit(Fit(student, encoders), seed)
    train = bench.data.labelled(bench.data.rows("train"), LEARN, encoders)
    cuts = {}
    for width in dict.fromkeys((whole.width, *(w for w in widths if w < whole.width))):
        cut = whole if width == whole.width else narrowed(whole, width, train, bench.validation_set(encoders), student)
        cuts[f"nested {width}"] = _judged(bench, *_vectors(bench, cut, encoders))
        if width < whole.width:
            queries, items = _vectors(bench, whole, encoders)
            reduce_queries, reduce_items = reduction(whole.query_vectors(train.query_features), items, width)
            cuts[f"reduced {width}"] = _judged(bench, queries @ reduce_queries, items @ reduce_items)
    return {"cuts": cuts}


def _separate(bench: Bench, width: int, seed: int) -> dict[str, Any]:
    """A network fitted for embeddings of ``width`` columns."""
    encoders = bench.size.network
    own = bench.fit(Fit(replace(bench.student, out_dim=width - 1), encoders), seed)
    return {"judged": _judged(bench, *_vectors(bench, own, encoders))}


def _vectors(bench: Bench, student: Student, encoders: tuple[str, ...]) -> tuple[FloatArray, FloatArray]:
    held_out = bench.test_set(encoders)
    return student.query_vectors(held_out.query_features), student.item_vectors(held_out.item_features)


def _judged(bench: Bench, queries: FloatArray, items: FloatArray) -> dict[str, Any]:
    """By storage: the order its codes give, judged; and what they take."""
    found = {}
    for storage in STORAGES:
        index = stored(storage, items)
        found[storage] = {"judged": bench.judge(full_scores(index, queries), bench.held_out.tau),
                          "stored": {"bytes_per_item": float(index.sa_code_size())}}  # fmt: skip
    return found


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
    """p50 and p99 of one search by storage and by served tier, among random unit vectors: for time only."""
    count = bench.size.timing_items
    rng = np.random.default_rng([bench.seed, width])
    vectors = rng.standard_normal((count, width), dtype=np.float32)
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
    main, tiers, rows = found["main"], found["tiers"], found["rows"]
    exact = tiers[0]
    lines = []
    for head, way in dict.fromkeys((r["head"], r["way"]) for r in rows):
        lines += [sentence(f"{head}: {r['dimensions']} columns, {way},", f"{found['widest'][head]}", r["minus_widest"],
                           main)
                  for r in rows if (r["head"], r["way"], r["tier"]) == (head, way, exact) and r["minus_widest"]
                  and way != "reduced"]  # fmt: skip
    exacts = {(r["head"], r["way"], r["dimensions"]): r for r in rows if r["tier"] == exact}
    for tier in found["tiers"][1:]:
        pairs = [(r, exacts[r["head"], r["way"], r["dimensions"]]) for r in rows if r["tier"] == tier]
        size = np.mean([e["bytes_per_item"] / r["bytes_per_item"] for r, e in pairs])
        worst = {head: min(r[main]["mean"] - e[main]["mean"] for r, e in pairs if r["head"] == head)
                 for head in dict.fromkeys(r["head"] for r, _ in pairs)}  # fmt: skip
        said = ", ".join(f"{head} {change:+.3f}" for head, change in worst.items())
        lines.append(f"{tier} codes take {size:.1f} times less than {exact}; {main} moves at worst by: {said}.")
    cells = [[r["head"], str(r["dimensions"]), r["way"], *(number(r[m]) for m in found["measures"]),
              f"{r['bytes_per_item']:.0f}"]
             for r in sorted(exacts.values(), key=lambda r: (r["head"], -r["dimensions"], r["way"]))]  # fmt: skip
    cells += [[r["name"], "", r["kind"], *(number(r[m]) for m in found["measures"]), ""] for r in found["baselines"]]
    one = table(["head", "width", "way", *found["measures"], f"bytes an item, {exact}"], cells)
    at = {(r["head"], r["dimensions"], r["tier"]): r for r in rows if r["way"] == "nested"}
    places = sorted({(head, width) for head, width, _ in at}, key=lambda p: (p[0], -p[1]))
    two = table(["head, nested", "width", *(f"{main} by {tier}, bytes" for tier in tiers)],
                [[head, str(width), *(f"{number(at[head, width, tier][main])}, "
                                      f"{at[head, width, tier]['bytes_per_item']:.0f}" for tier in tiers)]
                 for head, width in places])  # fmt: skip
    return " ".join(lines) + f"\n\n{one}\n\n{two}\n\n{_speeds(found)}"


def _speeds(found: Mapping[str, Any]) -> str:
    """By width: a bare FAISS scan of each storage, then the tiers of the index with what they take."""
    bare: dict[int, dict[str, str]] = {}
    for r in found["rows"]:
        if r["search_ms"]:
            bare.setdefault(r["dimensions"], {})[r["tier"]] = _times(r["search_ms"])
    served = {(r["dimensions"], r["tier"]): r for r in found["served"]}
    names = list(dict.fromkeys(r["tier"] for r in found["served"]))
    head = [f"search of {found['timing_items']:,}, p50 / p99 ms", *(f"{t}, bare" for t in found["tiers"]),
            *(f"`{n}` as served; bytes in memory" for n in names)]  # fmt: skip
    return table(head, [[str(w), *(bare[w][t] for t in found["tiers"]),
                         *(f"{_times(served[w, n])}; {served[w, n]['bytes_per_item']:.0f}" for n in names)]
                        for w in sorted(bare, reverse=True)])  # fmt: skip


def _times(spent: Mapping[str, float]) -> str:
    return f"{spent['p50']:.2f} / {spent['p99']:.2f}"


def draw(found: Mapping[str, Any], path: Path) -> bool:
    """mAP by width for each head and way, nested ones by storage too, and search time by width."""
    quality: dict[str, list[Any]] = {}
    speed: dict[str, list[Any]] = {}
    exact, main = found["tiers"][0], found["main"]
    for r in found["rows"]:
        if r["way"] == "nested" or r["tier"] == exact:
            quality.setdefault(f"{r['head']}, {r['way']}, {r['tier']}", []).append((r["dimensions"], r[main]))
        if r["way"] == "nested" and r["search_ms"]:
            speed.setdefault(r["tier"], []).append((r["dimensions"], r["search_ms"]["p50"]))
    panels = {main: quality, f"p50 of a search of {found['timing_items']:,}, ms": speed}
    return curves(panels, path, {t: "columns of an embedding" for t in panels}, "")
