"""Ways to store an embedding that the study of dimensions compares: what is in memory, and how it orders the corpus.

Why it exists: a tier of ``byline.index`` always answers with exact scores (codes propose, the exact vectors decide), so
its order says nothing of its codes. Here the codes alone order the items, which is what remains where the exact
vectors do not fit; the served tiers are timed beside them.
"""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from byline.index import VectorIndex, build_index

FloatArray = npt.NDArray[np.float32]
#: Name to FAISS factory string; exact first, as the others are compared with it.
STORAGES = {"float32": "Flat", "8 bit": "SQ8", "4 bit": "SQ4"}
#: Tiers of ``byline.index`` that scan every item.
SERVED = ("Flat", "SQ8,RFlat")
_native: Any = faiss


def stored(name: str, vectors: FloatArray) -> Any:
    """A FAISS index of ``vectors`` [n, d] by inner product, codes only."""
    index = _native.index_factory(vectors.shape[1], STORAGES[name], faiss.METRIC_INNER_PRODUCT)
    rows = np.ascontiguousarray(vectors, dtype=np.float32)
    index.train(rows)
    index.add(rows)
    return index


def full_scores(index: Any, queries: FloatArray) -> FloatArray:
    """Scores [q, n] of all items as the codes give them."""
    scores, places = index.search(np.ascontiguousarray(queries, dtype=np.float32), index.ntotal)
    out: FloatArray = np.empty_like(scores)
    np.put_along_axis(out, places, scores, axis=1)
    return out


def served(factory: str, vectors: FloatArray) -> VectorIndex:
    """An index as a release has it."""
    return build_index(np.arange(len(vectors), dtype=np.int64), vectors, factory)
