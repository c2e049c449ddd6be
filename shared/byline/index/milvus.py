"""Milvus behind the same interface: the distributed engine for what does not fit one machine.

Why it exists: hundreds of millions of vectors are not our engineering to do again. The same client code talks to a
cluster (``http://host:19530``) and to milvus-lite (a file name), which the tests run for real. The engine finds
candidates under the filter; their vectors come back with them and are scored here, so scores, order and ties are those
of every other tier. Needs the extra ``milvus``.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any, Self

import faiss
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from byline.errors import ReleaseCorrupt
from byline.index.exact_store import Allowed, ExactStore, best, checked_queries, checked_rows, unanswered
from byline.index.protocol import Ids, IndexStats, Vectors

FACTORY = "Milvus"
#: Milvus answers at most this many in one search.
LIMIT = 16_384
_ROWS_PER_CALL = 1_000
_MORE = 8


class MilvusIndex:
    """A collection with fields ``id`` (int64, primary) and ``vector``, searched by inner product."""

    def __init__(self, uri: str, collection: str, ids: Ids, dim: int, token: str = "", index_type: str = "AUTOINDEX",
                 build_seconds: float | None = None) -> None:
        """Connect to a collection that holds exactly ``ids`` [n], ascending. ``build`` makes one, ``load`` opens one.

        ``token`` is a secret and is never saved. ModuleNotFoundError says how to install the client.
        """
        try:
            from pymilvus import MilvusClient
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("Milvus needs its client: pip install 'byline[milvus]'") from error
        self._client: Any = MilvusClient(uri=uri, token=token)
        self._uri, self._collection, self._index_type = uri, collection, index_type
        self._ids, self._dim = ids, dim
        self._build_seconds = build_seconds

    @property
    def ntotal(self) -> int:
        """Vectors held."""
        return len(self._ids)

    @property
    def dim(self) -> int:
        """Width of a vector."""
        return self._dim

    @property
    def factory(self) -> str:
        """``Milvus``."""
        return FACTORY

    @property
    def ids(self) -> Ids:
        """All ids [ntotal], ascending."""
        return self._ids

    @property
    def stats(self) -> IndexStats:
        """What it costs here: the ids. What the engine spends is the engine's business."""
        return IndexStats(FACTORY, self.ntotal, self._dim, 8.0, 8.0 + 4.0 * self._dim, self._build_seconds)

    @classmethod
    def build(cls, ids: Ids, vectors: Vectors, uri: str = "", collection: str = "", token: str = "",
              index_type: str = "AUTOINDEX") -> Self:
        """Make ``collection`` at ``uri`` anew and fill it; ``index_type`` is Milvus's (``FLAT`` is exact).

        ``collection`` empty: a name made of the digest of ids and vectors; if it is there and whole it is taken as it
        is, because another release may be answering from it.
        """
        if not uri:
            raise ValueError("a Milvus index needs a uri: http://host:19530, or a file name for milvus-lite")
        begun = time.perf_counter()
        ids, vectors = checked_rows(ids, vectors)
        name = collection or "byline_" + _digest(ids, vectors)
        made = cls(uri, name, ids, vectors.shape[1], token, index_type)
        if collection or made._held() != len(ids):
            made._fill(vectors)
        made._build_seconds = time.perf_counter() - begun
        return made

    def _fill(self, vectors: Vectors) -> None:
        from pymilvus import DataType

        client = self._client
        if client.has_collection(self._collection):
            client.drop_collection(self._collection)
        schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=self._dim)
        parameters = client.prepare_index_params()
        parameters.add_index("vector", index_type=self._index_type, metric_type="IP")
        client.create_collection(
            self._collection, schema=schema, index_params=parameters, consistency_level="Strong"
        )  # fmt: skip
        for start in range(0, len(vectors), _ROWS_PER_CALL):
            rows = slice(start, start + _ROWS_PER_CALL)
            named = zip(self._ids[rows].tolist(), vectors[rows], strict=True)
            client.insert(self._collection, [{"id": i, "vector": vector} for i, vector in named])
        client.flush(self._collection)
        client.load_collection(self._collection)

    def search(self, queries: Vectors, k: int, exclude: Ids | None = None) -> tuple[Vectors, Ids]:
        """See ``VectorIndex.search``. ValueError for more than ``LIMIT`` answers."""
        queries = checked_queries(queries, k, self._dim)
        removed = np.intersect1d(self._ids, np.asarray([] if exclude is None else exclude, dtype=np.int64))
        left = self.ntotal - len(removed)
        scores, ids = unanswered(len(queries), k)
        wanted = min(k, left)
        if wanted > LIMIT:
            raise ValueError(f"Milvus answers at most {LIMIT} items, not {wanted}")
        for row in range(len(queries) if wanted else 0):
            scores[row, :wanted], ids[row, :wanted] = self._one(queries[row : row + 1], wanted, left, removed)
        return scores, ids

    def _one(self, query: Vectors, k: int, left: int, removed: Ids) -> tuple[Vectors, Ids]:
        """The k best [k] of one query; looks further while a tie at the last place could hide a smaller id."""
        most = min(left, LIMIT)
        depth = min(most, k + _MORE)
        while True:
            hits = self._client.search(
                self._collection, data=query.tolist(), limit=depth, output_fields=["vector"], anns_field="vector",
                search_params={"metric_type": "IP"}, **self._filter(removed),
            )[0]  # fmt: skip
            ids = np.array([hit["id"] for hit in hits], dtype=np.int64)
            vectors = np.array([hit["entity"]["vector"] for hit in hits], dtype=np.float32)
            order = np.argsort(ids)
            store = _store(ids[order], vectors[order])
            scores, positions = unanswered(1, len(hits))
            store.exact(query, len(hits), Allowed(None, len(hits)), scores, positions)
            if depth == most or scores[0, -1] < scores[0, k - 1]:
                named = store.named(positions)
                found = best(scores, named, k)
                return found[0][0], found[1][0]
            depth = min(most, 2 * depth)

    def _filter(self, removed: Ids) -> dict[str, Any]:
        """A boolean expression, by whichever list is shorter: what is forbidden or what is left. The numbers stand in
        it, because milvus-lite knows no parameters of filters."""
        if not len(removed):
            return {}
        if 2 * len(removed) <= self.ntotal:
            return {"filter": f"id not in {removed.tolist()}"}
        allowed = np.setdiff1d(self._ids, removed, assume_unique=True)
        return {"filter": f"id in {allowed.tolist()}"}

    def vectors(self, ids: Ids) -> Vectors:
        """The vectors [n, d] of ``ids`` [n], in their order. KeyError names an id that is not held."""
        wanted = np.asarray(ids, dtype=np.int64)
        unknown = wanted[~np.isin(wanted, self._ids)]
        if len(unknown):
            raise KeyError(f"item {unknown[0]} is not in the index")
        out = np.empty((len(wanted), self._dim), dtype=np.float32)
        for start in range(0, len(wanted), _ROWS_PER_CALL):
            asked = wanted[start : start + _ROWS_PER_CALL].tolist()
            rows = self._client.get(self._collection, ids=asked, output_fields=["id", "vector"])
            held = {row["id"]: row["vector"] for row in rows}
            for n, item in enumerate(asked):
                out[start + n] = held[item]
        return out

    def save(self, path: Path) -> None:
        """Write the ids and where the collection is; the vectors stay in the engine."""
        place = {"engine": FACTORY, "uri": self._uri, "collection": self._collection, "dim": str(self._dim)}
        save_file({"ids": self._ids}, path, metadata=place | {"index_type": self._index_type})

    @classmethod
    def load(cls, path: Path, mmap: bool = True, token: str = "") -> Self:
        """Open what ``save`` wrote. ReleaseCorrupt when it is broken or the collection is not there or not whole."""
        try:
            with safe_open(path, framework="numpy") as file:
                place, ids = file.metadata() or {}, file.get_tensor("ids")
            index = cls(place["uri"], place["collection"], ids, int(place["dim"]), token, place["index_type"])
        except (OSError, SafetensorError, KeyError) as error:
            raise ReleaseCorrupt(f"{path.name} does not name a Milvus collection", file=path.name) from error
        name, held = index._collection, index._held()
        if held != len(ids):
            raise ReleaseCorrupt(f"Milvus holds {held} items in {name}, {path.name} names {len(ids)}", file=path.name)
        index._client.load_collection(name)
        return index

    def _held(self) -> int:
        """Items in the collection; 0 where there is none."""
        if not self._client.has_collection(self._collection):
            return 0
        return int(self._client.get_collection_stats(self._collection)["row_count"])

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


def _store(ids: Ids, vectors: Vectors) -> ExactStore:
    """The exact store of a few candidates."""
    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(np.ascontiguousarray(vectors))
    return ExactStore(ids, flat)


def _digest(ids: Ids, vectors: Vectors) -> str:
    digest = hashlib.sha256(ids.tobytes())
    for start in range(0, len(vectors), 65_536):
        digest.update(vectors[start : start + 65_536].tobytes())
    return digest.hexdigest()[:16]
