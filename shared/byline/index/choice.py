"""Which index a release gets: by the size of its corpus and by recall measured on its own vectors.

Why it exists: no tier is best everywhere, and an approximate one that was good on a benchmark may be poor on this
corpus. Exact search is kept while it is fast enough (``FLAT_BYTES``). Beyond that every tier is built, its effort
raised until recall@100 against exact search reaches the target on one half of the sampled queries, and confirmed on the
other half with a standard error to spare; of those that reach it the one with the least work for a query is taken. Work
is counted, not timed, so that the same vectors give the same choice on a busy machine. Nothing here assumes unit norm:
where norms vary a lot lists may find too little at any effort, and codes scanned in full or exact search remain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from byline.index.exact_store import ExactStore, unanswered
from byline.index.factory import build_index
from byline.index.flat import FACTORY, FlatIndex
from byline.index.milvus import FACTORY as MILVUS
from byline.index.protocol import Ids, VectorIndex, Vectors
from byline.index.refined import EXACT_ROWS, RefinedIndex
from byline.index.scan import MatrixScan, exact_by_scan
from byline.index.tiers import HNSWIndex, IVFIndex, IVFRaBitQIndex, default_lists

#: Let the choice be measured.
AUTO = "auto"
#: Exact search while it reads at most this much for a query: about 5 ms of one core.
FLAT_BYTES = 64_000_000
TARGET = 0.99
RECALL_AT = 100
#: Links are dear to make; a graph is only tried up to this size, and where lists and codes need more than this.
_GRAPH_ITEMS, _GRAPH_MS = 300_000, 3.0
#: Bytes a millisecond of one core gets through, as ``make bench-index`` measures them: vectors in order, byte codes in
#: order, bit codes in order, vectors picked here and there.
_IN_ORDER, _BYTE_CODES, _BIT_CODES, _PICKED = 13e6, 5.5e6, 3.5e6, 3e6
_DISTANCES_PER_EF = 8.0

Effort = dict[str, float]


@dataclass(frozen=True)
class Trial:
    """One tier at the effort it needed. ``recall`` is of the confirming half, ``work_ms`` the modelled cost."""

    factory: str
    effort: Effort
    recall: float
    bytes_per_item: float
    work_ms: float
    accepted: bool


@dataclass(frozen=True)
class IndexChoice:
    """The index, and why it is this one: what the manifest records. ``recall`` at ``recall_at`` against exact search,
    over ``queries`` queries (0: exact by construction)."""

    index: VectorIndex
    factory: str
    forced: bool
    reason: str
    target: float
    recall_at: int
    recall: float
    queries: int
    bytes_per_item: float
    effort: Effort = field(default_factory=dict)
    tried: tuple[Trial, ...] = ()


def choose_index(
    ids: Ids, vectors: Vectors, *, queries: Vectors | None = None, factory: str = AUTO, target: float = TARGET,
    samples: int = 128, seed: int = 0, flat_bytes: int = FLAT_BYTES,
    progress: Callable[[str], None] = lambda what: None,
) -> IndexChoice:  # fmt: skip
    """Build the index of ``vectors`` [n, d] under ``ids`` [n].

    ``queries`` [q, d] are what the index will be asked, as far as known; None: rows of the corpus itself. At most
    ``samples`` of them are used, drawn with ``seed``. A ``factory`` other than ``auto`` is taken whatever its recall,
    which is measured all the same. ValueError for an unknown factory and as ``build_index`` raises.
    """
    size = 4 * vectors.shape[1] * len(vectors) if vectors.ndim == 2 else 0
    if factory == FACTORY or (factory == AUTO and (size <= flat_bytes or len(vectors) <= EXACT_ROWS)):
        return _flat(FlatIndex.build(ids, vectors), factory == FACTORY, size, target)
    rng = np.random.default_rng(seed)
    pool = vectors if queries is None or not len(queries) else queries
    asked = np.asarray(pool[np.sort(rng.permutation(len(pool))[:samples])], dtype=np.float32)
    if factory.partition(":")[0] == MILVUS:
        return _by_engine(ids, vectors, build_index(ids, vectors, factory), asked, target)
    judge = _Judge(asked, min(RECALL_AT, len(vectors)), target)
    tried: list[Trial] = []
    best: RefinedIndex | None = None
    for name in candidates(factory, len(vectors), vectors.shape[1], tried):
        progress(name)
        index = build_index(ids, vectors, name)
        if not isinstance(index, RefinedIndex):
            raise ValueError(f"{name} is not a tier whose recall can be measured")
        trial = judge.measured(index)
        tried.append(trial)
        if factory != AUTO or least_work(tried) is trial:
            best = index
        del index  # before the next is built: each holds a copy of the vectors
    if best is None:
        exact = _flat(FlatIndex.build(ids, vectors), False, size, target)
        reason = f"no approximate tier reached recall@{RECALL_AT} of {target:g}"
        return IndexChoice(**{**vars(exact), "reason": reason, "tried": tuple(tried)})
    chosen = tried[-1] if factory != AUTO else least_work(tried) or tried[-1]
    reason = "asked for" if factory != AUTO else f"least work for a query of those with recall of at least {target:g}"
    return IndexChoice(
        best, chosen.factory, factory != AUTO, reason, target, judge.k, chosen.recall, len(judge.confirming),
        chosen.bytes_per_item, chosen.effort, tuple(tried),
    )  # fmt: skip


def least_work(tried: Sequence[Trial]) -> Trial | None:
    """The trial that is chosen: of those that reached the target the one with the least work, the first of equals."""
    return min((trial for trial in tried if trial.accepted), key=lambda trial: trial.work_ms, default=None)


def work_ms(index: RefinedIndex) -> float:
    """Modelled milliseconds of one core for one query at k = 100: bytes read, by how fast each kind is read."""
    row, n = 4.0 * index.dim, index.ntotal
    refine = index.k_factor * RECALL_AT * row / _PICKED
    if isinstance(index, HNSWIndex):
        return index.effort["efSearch"] * _DISTANCES_PER_EF * row / _PICKED
    if isinstance(index, IVFIndex):
        lists = int(index.factory.split("IVF")[1].split(",")[0])
        codes = n * min(index.effort["nprobe"] / lists, 1.0) * index.code_bytes
        bits = isinstance(index, IVFRaBitQIndex)
        turn = row * index.dim / _IN_ORDER if bits else 0.0
        return lists * row / _IN_ORDER + turn + codes / (_BIT_CODES if bits else _BYTE_CODES) + refine
    return n * index.code_bytes / _BYTE_CODES + refine


def recall_of(index: VectorIndex, queries: Vectors, k: int, kth: Vectors) -> float:
    """Share of the k best that come back, over all queries (see ``recalls``)."""
    return float(recalls(index, queries, k, kth).mean())


def recalls(index: VectorIndex, queries: Vectors, k: int, kth: Vectors) -> NDArray[np.float64]:
    """Share [q] of each query's k best that come back. ``kth`` [q] is each query's exact k-th score: an item that
    ties with it counts, because scores are exact at every tier."""
    scores, _ = index.search(queries, k)
    shares: NDArray[np.float64] = (scores >= kth[:, None]).mean(axis=1, dtype=np.float64)
    return shares


def exact_kth(store: ExactStore, queries: Vectors, k: int) -> Vectors:
    """The exact k-th best score [q] of every query."""
    scores, positions = unanswered(len(queries), k)
    everything = store.allowed(None)
    if k < store.ntotal:
        exact_by_scan(store, MatrixScan(store.rows), queries, k, everything, scores, positions)
    else:
        store.exact(queries, k, everything, scores, positions)
    return scores[:, -1]


def tune(index: RefinedIndex, reaches: Callable[[RefinedIndex], bool]) -> bool:
    """Raise the index's effort until ``reaches(index)``; False (and the highest effort) if it never does."""
    for effort in efforts(index):
        index.with_effort(effort)
        if reaches(index):
            return True
    return False


def efforts(index: RefinedIndex) -> Iterator[Effort]:
    """Efforts of a tier, from little work to much."""
    if isinstance(index, HNSWIndex):
        yield from ({"efSearch": float(width)} for width in (128, 192, 256, 384, 512, 768, 1024))
        return
    if not isinstance(index, IVFIndex):
        yield from ({"k_factor": factor} for factor in (1.0, 2.0, 4.0))
        return
    lists = int(index.factory.split("IVF")[1].split(",")[0])
    factors = (4.0, 8.0, 16.0) if isinstance(index, IVFRaBitQIndex) else (2.0,)
    for step in range(11):  # from a 64th of the lists to half of them
        share = 2.0 ** (step / 2 - 6)
        yield from ({"nprobe": max(1.0, round(lists * share)), "k_factor": factor} for factor in factors)


class _Judge:
    """The sampled queries, halved, and their exact answers, found once.

    The effort is the least that passes, so its recall on the tuning half is flattered, and where it passes the
    confirming half by a hair, too: hence the standard error that must be left there.
    """

    def __init__(self, queries: Vectors, k: int, target: float) -> None:
        self.k = k
        mixed = np.random.default_rng(0).permutation(len(queries))  # they may come in an order that means something
        half = max(1, len(queries) // 2)
        self.tuning, self.confirming = queries[mixed[:half]], queries[mixed[-half:]]
        self._target = target
        self._kth: tuple[Vectors, Vectors] | None = None

    def measured(self, index: RefinedIndex) -> Trial:
        """Tune the index; both halves must reach the target at the effort that is kept."""
        if self._kth is None:
            self._kth = (exact_kth(index.store, self.tuning, self.k), exact_kth(index.store, self.confirming, self.k))
        tuning, confirming = self._kth
        recall = 0.0

        def reaches(tier: RefinedIndex) -> bool:
            nonlocal recall
            if recall_of(tier, self.tuning, self.k, tuning) < self._target:
                recall = 0.0
                return False
            each = recalls(tier, self.confirming, self.k, confirming)
            recall = float(each.mean())
            enough: bool = recall - float(each.std()) / len(each) ** 0.5 >= self._target
            return enough

        accepted = tune(index, reaches)
        if not recall:
            recall = recall_of(index, self.confirming, self.k, confirming)
        return Trial(
            index.factory, index.effort, round(recall, 5), round(index.stats.bytes_per_item, 1),
            round(work_ms(index), 3), accepted,
        )  # fmt: skip


def candidates(factory: str, items: int, dim: int, tried: list[Trial]) -> Iterator[str]:
    """Factories to try. ``tried`` is read when the graph's turn comes."""
    if factory != AUTO:
        yield factory
        return
    lists = default_lists(items)
    yield from (f"IVF{lists},SQ8,RFlat", f"RR{dim},IVF{lists},RaBitQ,RFlat", "SQ8,RFlat")
    best = least_work(tried)
    if graph_is_worth_it(items, None if best is None else best.work_ms):
        yield "HNSW32,Flat"


def graph_is_worth_it(items: int, best_ms: float | None) -> bool:
    """Whether links are made at all, ``best_ms`` being the least work of the other tiers (None: none sufficed)."""
    return items <= _GRAPH_ITEMS and (best_ms is None or best_ms > _GRAPH_MS)


def _flat(index: FlatIndex, forced: bool, size: int, target: float) -> IndexChoice:
    """Exact search, with the reason in words."""
    reason = "asked for" if forced else f"exact search reads only {size / 1e6:.1f} MB for a query"
    return IndexChoice(index, FACTORY, forced, reason, target, RECALL_AT, 1.0, 0, index.stats.bytes_per_item)


def _by_engine(ids: Ids, vectors: Vectors, index: VectorIndex, queries: Vectors, target: float) -> IndexChoice:
    """An engine of its own, which is not tuned here: its recall is measured and told."""
    k = min(RECALL_AT, len(vectors))
    _, places = MatrixScan(np.ascontiguousarray(vectors, dtype=np.float32)).top(queries, k, None)
    kth = [
        FlatIndex.build(ids[rows], vectors[rows]).search(query[None], k)[0][0, -1]
        for query, rows in zip(queries, places, strict=True)
    ]
    recall = recall_of(index, queries, k, np.array(kth, dtype=np.float32))
    return IndexChoice(
        index, index.factory, True, "asked for", target, k, round(recall, 5), len(queries), index.stats.bytes_per_item
    )
