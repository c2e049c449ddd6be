"""Every index tier on the same vectors: what it costs to keep, build and ask, what it finds, what FAISS alone takes.

Why it exists: "fast" is a ratio, so our search, the bare FAISS call on the very same index, a numpy and a torch scan
are timed in turn, query by query, in one process. Times are CPU milliseconds of one thread, which neighbours on the
machine disturb least; the wall's median stands beside them. An approximate tier is first tuned to the target on queries
of its own (``byline.index.choice``); its recall is then measured on the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from byline.evaluation.bench_index_data import Rows
from byline.index import FlatIndex, choose_index
from byline.index.choice import FLAT_BYTES, RECALL_AT, exact_kth, graph_is_worth_it, recall_of
from byline.index.exact_store import native
from byline.index.protocol import Ids, VectorIndex, Vectors
from byline.index.refined import RefinedIndex
from byline.index.tiers import default_lists

Floats = npt.NDArray[np.float32]
Row = dict[str, Any]
BATCH = 64
TIERS = ("flat", "sq8", "ivf_sq8", "ivf_rabitq", "hnsw")


@dataclass(frozen=True)
class Plan:
    """How much is asked. ``timed`` queries are asked one by one; ``batches`` batches of ``BATCH``."""

    timed: int = 200
    batches: int = 5
    seed: int = 0


def factory_of(tier: str, items: int, dim: int) -> str:
    """The FAISS factory string of a tier's name."""
    lists = default_lists(items)
    return {"flat": "Flat", "sq8": "SQ8,RFlat", "ivf_sq8": f"IVF{lists},SQ8,RFlat",
            "ivf_rabitq": f"RR{dim},IVF{lists},RaBitQ,RFlat", "hnsw": "HNSW32,Flat"}[tier]  # fmt: skip


def measure_tier(rows: Rows, tier: str, plan: Plan) -> Row:
    """One row of the result: see the module. The first half of the queries tunes, the second measures."""
    count, dim = rows.vectors.shape
    half = len(rows.queries) // 2
    tuning, queries = rows.queries[:half], rows.queries[half:]
    ids: Ids = np.arange(count, dtype=np.int64) * 977 + 11
    begun = time.perf_counter()
    choice = choose_index(ids, rows.vectors, queries=tuning, factory=factory_of(tier, count, dim))
    seconds = time.perf_counter() - begun
    index = choice.index
    k = min(RECALL_AT, count)
    store = index.store if isinstance(index, (FlatIndex, RefinedIndex)) else None
    assert store is not None  # noqa: S101
    asked = queries[: plan.timed]
    stats = index.stats
    row: Row = {
        "set": rows.name, "n": count, "dim": dim, "tier": tier, "factory": index.factory, "effort": choice.effort,
        "bytes_per_item": round(stats.bytes_per_item, 1),
        "stored_bytes_per_item": round(stats.stored_bytes_per_item, 1),
        "build_s": round(stats.build_seconds or 0.0, 3), "tune_s": round(seconds - (stats.build_seconds or 0.0), 3),
        "recall100": round(recall_of(index, queries, k, exact_kth(store, queries, k)), 5),
        "work_ms": choice.tried[0].work_ms if choice.tried else None,
        "tuned_recall100": choice.recall, "accepted": bool(choice.tried and choice.tried[0].accepted),
        "what": rows.what,
    }  # fmt: skip
    row |= _single(index, asked, k)
    row |= _batched(index, queries, k, plan)
    return row | _filtered(index, store, queries[: max(8, plan.timed // 8)], k, ids, plan.seed)


def measure_scans(rows: Rows, plan: Plan) -> list[Row]:
    """A numpy and a torch scan of the same vectors, and the time that reading them takes at full memory bandwidth."""
    queries = rows.queries[len(rows.queries) // 2 :]
    tensor = torch.from_numpy(rows.vectors)
    k = min(RECALL_AT, len(rows.vectors))

    def by_numpy(asked: Vectors) -> object:
        scores = asked @ rows.vectors.T
        best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        return np.take_along_axis(best, np.argsort(-np.take_along_axis(scores, best, 1), axis=1), 1)

    def by_torch(asked: Vectors) -> object:
        return (torch.from_numpy(asked) @ tensor.T).topk(k, dim=1)

    found = []
    count, dim = rows.vectors.shape
    for name, scan in (("numpy_scan", by_numpy), ("torch_scan", by_torch)):
        cpu, wall = _timed([lambda q=q, scan=scan: scan(q) for q in _each(queries[: plan.timed])])  # type: ignore[misc]
        batch, _ = _timed([lambda scan=scan: scan(queries[:BATCH])] * plan.batches)  # type: ignore[misc]
        found.append({"set": rows.name, "n": count, "dim": dim, "tier": name, "p50_ms": _at(cpu, 50),
                      "p99_ms": _at(cpu, 99), "wall_p50_ms": _at(wall, 50), "batch_p50_ms": _at(batch, 50),
                      "recall100": 1.0, "bytes_per_item": 4.0 * dim})  # fmt: skip
    speed = bandwidth(rows.vectors)
    limit = rows.vectors.nbytes / speed * 1e3
    return [*found, {"set": rows.name, "n": count, "dim": dim, "tier": "memory_bandwidth", "p50_ms": round(limit, 4),
                     "gigabytes_per_second": round(speed / 1e9, 2), "bytes_per_item": 4.0 * dim}]  # fmt: skip


def bandwidth(vectors: Floats, repeats: int = 5) -> float:
    """Bytes a second that one thread reads from memory: the best of some ways of summing all of ``vectors`` up."""
    flat = vectors.reshape(-1)
    tensor = torch.from_numpy(flat)
    ones = np.ones(vectors.shape[1], dtype=np.float32)
    ways: tuple[Callable[[], object], ...] = (flat.sum, tensor.sum, tensor.max, lambda: vectors @ ones)
    return float(vectors.nbytes / (min(float(_timed([way] * repeats)[0].min()) for way in ways) / 1e3))


def marked(rows: list[Row]) -> list[Row]:
    """``rows`` with ``chosen`` at the tier that a release of this size and set gets by default: the rule of
    ``choice``, on what it saw, the tuning queries. ``recall100`` is of other queries."""
    for key in {(row["set"], row["n"]) for row in rows}:
        mine = [row for row in rows if (row["set"], row["n"]) == key and row["tier"] in TIERS]
        flat = [row for row in mine if row["tier"] == "flat"]
        fit = [row for row in mine if row["accepted"] and row["tier"] != "hnsw"]
        least = min((row["work_ms"] for row in fit), default=None)
        if graph_is_worth_it(key[1], least):
            fit += [row for row in mine if row["accepted"] and row["tier"] == "hnsw"]
        small = key[1] * 4 * mine[0]["dim"] <= FLAT_BYTES if mine else False
        chosen = flat if small else [min(fit, key=lambda row: row["work_ms"])] if fit else flat
        for row in mine:
            row["chosen"] = any(row is one for one in chosen)
    return rows


def _single(index: VectorIndex, queries: Vectors, k: int) -> Row:
    """Ours and the bare FAISS call, in turn, one query at a time.

    Never the same query one after the other: the second would find the candidates' vectors in the cache.
    """
    bare = _bare(index)
    for query in _each(queries[:5]):
        index.search(query, k)
        bare.search(query, k)
    calls: list[Callable[[], object]] = []
    each = _each(queries)
    for query, other in zip(each, each[len(each) // 2 :] + each[: len(each) // 2], strict=True):
        calls += [lambda q=query: index.search(q, k), lambda q=other: bare.search(q, k)]  # type: ignore[misc]
    cpu, wall = _timed(calls)
    return {
        "p50_ms": _at(cpu[0::2], 50), "p99_ms": _at(cpu[0::2], 99), "wall_p50_ms": _at(wall[0::2], 50),
        "faiss_p50_ms": _at(cpu[1::2], 50), "faiss_p99_ms": _at(cpu[1::2], 99),
        "ratio_to_faiss": round(float(np.median(cpu[0::2]) / np.median(cpu[1::2])), 4),
    }  # fmt: skip


def _batched(index: VectorIndex, queries: Vectors, k: int, plan: Plan) -> Row:
    """A batch of 64, by us and by FAISS; milliseconds of the whole batch."""
    batch = queries[:BATCH]
    bare = _bare(index)
    index.search(batch, k)
    cpu, _ = _timed([lambda: index.search(batch, k), lambda: bare.search(batch, k)] * plan.batches)
    return {
        "batch": len(batch), "batch_p50_ms": _at(cpu[0::2], 50), "batch_p99_ms": _at(cpu[0::2], 99),
        "faiss_batch_p50_ms": _at(cpu[1::2], 50),
        "batch_ratio_to_faiss": round(float(np.median(cpu[0::2]) / np.median(cpu[1::2])), 4),
    }  # fmt: skip


def _filtered(index: VectorIndex, store: Any, queries: Vectors, k: int, ids: Ids, seed: int) -> Row:
    """Recall and time with 99 % and with half of the items removed before top-k, the same ones from query to query."""
    found: Row = {}
    for name, share in (("99", 0.99), ("50", 0.5)):
        removed = np.random.default_rng(seed).permutation(ids)[: int(share * len(ids))]
        removed.setflags(write=False)  # as the workers' are: the index remembers where they are
        allowed = store.allowed(removed)
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        store.exact(queries, k, allowed, scores, np.zeros(scores.shape, dtype=np.int64))
        cpu, _ = _timed([lambda q=q, e=removed: index.search(q, k, e) for q in _each(queries)])  # type: ignore[misc]
        answers, _ = index.search(queries, k, removed)
        kth = scores[:, min(k, allowed.count) - 1]
        found[f"removed{name}_recall100"] = round(float((answers >= kth[:, None])[:, : allowed.count].mean()), 5)
        found[f"removed{name}_p50_ms"] = _at(cpu, 50)
    return found


def _bare(index: VectorIndex) -> Any:
    """The FAISS object inside, with the candidates refined as FAISS does it itself."""
    assert isinstance(index, (FlatIndex, RefinedIndex))  # noqa: S101
    return index._index


def _each(queries: Vectors) -> list[Vectors]:
    return [queries[n : n + 1] for n in range(len(queries))]


def _timed(calls: Sequence[Callable[[], object]]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """CPU and wall milliseconds of every call, one after another."""
    cpu, wall = np.empty(len(calls)), np.empty(len(calls))
    for n, call in enumerate(calls):
        started, began = time.perf_counter(), time.process_time()
        call()
        cpu[n], wall[n] = (time.process_time() - began) * 1e3, (time.perf_counter() - started) * 1e3
    return cpu, wall


def _at(milliseconds: npt.NDArray[np.float64], percentile: float) -> float:
    return round(float(np.percentile(milliseconds, percentile)), 4)


def one_thread() -> None:
    """FAISS, torch and what lies below them on one thread, as the workers run."""
    native.omp_set_num_threads(1)
    torch.set_num_threads(1)

