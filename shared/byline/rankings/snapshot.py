"""Labels as two files that travel with the repository: export from the database, import into a fresh one.

Why it exists: an hour of teacher's work must not be repeated on every machine. A snapshot holds what a ranking holds
(raw τ, standard errors, the two disjoint noise halves, the query's image, prompt and split), so whoever imports it can
re-rank, re-weigh and judge as if the teacher had run there. ``labels.json`` says of which model, corpus and teacher it
is and is checked first; ``labels.safetensors`` holds the arrays, half precision with one scale per query.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from sqlalchemy import Connection, Engine, select
from sqlalchemy.dialects.postgresql import insert

from byline.catalog.blobs import BlobStore
from byline.db.models import Base
from byline.db.session import transaction
from byline.errors import LabelsNotUsable
from byline.rankings.store import NOT_A_REPEAT

FORMAT = "byline-labels-1"
METADATA = "labels.json"
ARRAYS = "labels.safetensors"
_NAMESPACE = uuid.UUID("6f1f3c57-6b0f-5d0c-9c2c-2c1f5a6f0b11")
_queries = Base.metadata.tables["queries"]
_rankings = Base.metadata.tables["rankings"]

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SnapshotHeader:
    """What the labels are of. ``made_by`` is the command that made them."""

    model_id: str
    model_revision: str
    corpus_id: str
    teacher_id: str
    made_by: str = ""


@dataclass(frozen=True)
class SnapshotQuery:
    """One ranked query. ``item_ids`` int64 [n]; ``tau``, ``standard_error`` [n]; ``tau_halves`` [2, n] or None;
    ``samples`` int32 [n], the loss evaluations each τ rests on, or None where nobody counted."""

    prompt: str
    seed: int
    split: str
    near_duplicate_group: int
    source: str
    candidate_set: str
    draws: int
    image: bytes
    item_ids: npt.NDArray[np.int64]
    tau: FloatArray
    standard_error: FloatArray
    tau_halves: FloatArray | None
    samples: npt.NDArray[np.int32] | None = None


@dataclass(frozen=True)
class ImportReport:
    """What an import added; ``present`` rankings were there already."""

    queries: int
    rankings: int
    present: int


def write_snapshot(path: Path, header: SnapshotHeader, queries: Sequence[SnapshotQuery]) -> None:
    """Write ``queries`` into the directory ``path``. The same input gives the same bytes."""
    candidates: dict[bytes, int] = {}
    entries: list[dict[str, Any]] = []
    for query in queries:
        if not (query.tau.shape == query.standard_error.shape == query.item_ids.shape):
            raise LabelsNotUsable(f"the ranking of {query.prompt!r} has arrays of different lengths")
        if query.samples is not None and query.samples.shape != query.tau.shape:
            raise LabelsNotUsable(f"the ranking of {query.prompt!r} does not count the samples of each item")
        ids = query.item_ids.astype("<i8").tobytes()
        entries.append({
            "prompt": query.prompt, "seed": query.seed, "split": query.split, "source": query.source,
            "near_duplicate_group": str(query.near_duplicate_group), "candidate_set": query.candidate_set,
            "draws": query.draws, "n": int(query.tau.shape[0]),
            "candidates": candidates.setdefault(ids, len(candidates)),
            "image_bytes": len(query.image), "image_sha256": hashlib.sha256(query.image).hexdigest(),
            "halves": query.tau_halves is not None,
        } | _samples_entry(query.samples))
    arrays = {f"candidates_{i}": np.frombuffer(ids, dtype="<i8") for ids, i in candidates.items()}
    arrays["images"] = np.frombuffer(b"".join(query.image for query in queries), dtype=np.uint8)
    arrays["tau"], arrays["tau_scale"] = _pack([query.tau for query in queries])
    arrays["standard_error"], arrays["standard_error_scale"] = _pack([query.standard_error for query in queries])
    halves = [query.tau_halves.ravel() for query in queries if query.tau_halves is not None]
    arrays["tau_halves"], arrays["tau_halves_scale"] = _pack(halves)
    unequal = [
        query.samples.astype("<i4") for query, entry in zip(queries, entries, strict=True)
        if query.samples is not None and entry["samples"] == "array"
    ]  # fmt: skip
    if unequal:
        arrays["samples"] = np.concatenate(unequal)
    path.mkdir(parents=True, exist_ok=True)
    save_file(arrays, str(path / ARRAYS))
    document = {"format": FORMAT, **asdict(header), "queries": entries,
                "arrays_sha256": hashlib.sha256((path / ARRAYS).read_bytes()).hexdigest()}
    (path / METADATA).write_text(json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def read_header(path: Path) -> SnapshotHeader:
    """What the snapshot in the directory ``path`` is of, without reading its arrays."""
    document = _document(path)
    return SnapshotHeader(**{name: document[name] for name in SnapshotHeader.__dataclass_fields__})


def read_snapshot(path: Path) -> tuple[SnapshotHeader, list[SnapshotQuery]]:
    """Read what :func:`write_snapshot` wrote; τ to about three decimal digits. LabelsNotUsable if it is damaged."""
    document = _document(path)
    try:
        if hashlib.sha256((path / ARRAYS).read_bytes()).hexdigest() != document["arrays_sha256"]:
            raise LabelsNotUsable(f"{path / ARRAYS} does not belong to {METADATA}: its digest differs")
        arrays = load_file(str(path / ARRAYS))
    except (OSError, SafetensorError) as error:
        raise LabelsNotUsable(f"cannot read {path / ARRAYS}: {error}") from error
    header = read_header(path)
    entries = document["queries"]
    lengths = [entry["n"] for entry in entries]
    taus = _unpack(arrays["tau"], arrays["tau_scale"], lengths)
    errors = _unpack(arrays["standard_error"], arrays["standard_error_scale"], lengths)
    with_halves = [2 * entry["n"] for entry in entries if entry["halves"]]
    halves = iter(_unpack(arrays["tau_halves"], arrays["tau_halves_scale"], with_halves))
    images = arrays["images"].tobytes()
    queries: list[SnapshotQuery] = []
    start = counted = 0
    for entry, tau, standard_error in zip(entries, taus, errors, strict=True):
        image = images[start : start + entry["image_bytes"]]
        start += entry["image_bytes"]
        samples = entry.get("samples")  # nothing in snapshots from before they were counted
        if samples == "array":
            samples = arrays["samples"][counted : counted + entry["n"]]
            counted += entry["n"]
        queries.append(SnapshotQuery(
            prompt=entry["prompt"], seed=entry["seed"], split=entry["split"], source=entry["source"],
            near_duplicate_group=int(entry["near_duplicate_group"]), candidate_set=entry["candidate_set"],
            draws=entry["draws"], image=image, item_ids=arrays[f"candidates_{entry['candidates']}"].astype(np.int64),
            tau=tau, standard_error=standard_error,
            tau_halves=next(halves).reshape(2, -1) if entry["halves"] else None,
            samples=None if samples is None else np.broadcast_to(np.asarray(samples, np.int32), tau.shape),
        ))
    return header, queries


def export_snapshot(engine: Engine, blobs: BlobStore, path: Path, header: SnapshotHeader) -> int:
    """Write all rankings of ``header.model_id`` by ``header.teacher_id`` into ``path``; returns how many.

    Queries are ordered by prompt, seed and candidate set, so that equal contents give equal files. What clients asked
    is left out: they agreed to be learnt from, not to be passed on. So are labels that only repeat another.
    """
    statement = (
        select(_queries, _rankings.c.candidate_set, _rankings.c.draws, _rankings.c.item_ids, _rankings.c.tau,
               _rankings.c.standard_error, _rankings.c.tau_halves, _rankings.c.samples)
        .join(_rankings, _rankings.c.query_id == _queries.c.id)
        .where(
            _rankings.c.model_id == header.model_id, _rankings.c.teacher_id == header.teacher_id, NOT_A_REPEAT,
            _queries.c.source != "live",
        )
    )  # fmt: skip
    with transaction(engine) as connection:
        rows = connection.execute(statement).mappings().all()
    if not rows:
        raise LabelsNotUsable(f"there are no rankings of {header.model_id} by {header.teacher_id} to export")
    rows = sorted(rows, key=lambda row: (row["prompt"], row["seed"], row["candidate_set"]))
    queries = [SnapshotQuery(
        prompt=row["prompt"], seed=row["seed"], split=row["split"], near_duplicate_group=row["near_duplicate_group"],
        source=row["source"], candidate_set=row["candidate_set"], draws=row["draws"],
        image=blobs.get(row["image_sha256"]), item_ids=np.frombuffer(row["item_ids"], dtype="<i8"),
        tau=np.frombuffer(row["tau"], dtype="<f4"), standard_error=np.frombuffer(row["standard_error"], dtype="<f4"),
        tau_halves=None if row["tau_halves"] is None else np.frombuffer(row["tau_halves"], dtype="<f4").reshape(2, -1),
        samples=None if row["samples"] is None else np.frombuffer(row["samples"], dtype="<i4"),
    ) for row in rows]
    write_snapshot(path, header, queries)
    return len(queries)


def import_snapshot(engine: Engine, blobs: BlobStore, path: Path, *, model_id: str, model_revision: str,
                    corpus_id: str) -> ImportReport:
    """Add the snapshot's queries, images and rankings; what is there already stays as it is.

    Raises LabelsNotUsable, having changed nothing, if the snapshot is of another model, revision or corpus.
    """
    header, queries = read_snapshot(path)
    expected = {"model_id": model_id, "model_revision": model_revision, "corpus_id": corpus_id}
    wrong = {name: value for name, value in expected.items() if getattr(header, name) != value}
    if wrong:
        differences = "; ".join(f"{name} is {getattr(header, name)!r}, here it is {value!r}"
                                for name, value in wrong.items())
        raise LabelsNotUsable(f"the label snapshot {path} does not fit: {differences}", path=path)
    digests = [blobs.put(query.image) for query in queries]
    with transaction(engine) as connection:
        ids, added = _insert_queries(connection, header, queries, digests)
        rows = [_ranking_row(header, query, query_id) for query, query_id in zip(queries, ids, strict=True)]
        written = 0
        for start in range(0, len(rows), 50):
            statement = insert(_rankings).values(rows[start : start + 50]).on_conflict_do_nothing()
            written += len(connection.execute(statement.returning(_rankings.c.id)).all())
    return ImportReport(queries=added, rankings=written, present=len(queries) - written)


def _insert_queries(connection: Connection, header: SnapshotHeader, queries: Sequence[SnapshotQuery],
                    digests: Sequence[str]) -> tuple[list[uuid.UUID], int]:
    """Ids of the queries in order (those already there keep theirs), and how many are new."""
    rows = {(query.prompt, query.seed): {
        "id": _identity(header.model_id, query.prompt, str(query.seed)), "model_id": header.model_id,
        "prompt": query.prompt, "seed": query.seed, "split": query.split, "image_sha256": digest,
        "near_duplicate_group": query.near_duplicate_group, "source": query.source,
    } for query, digest in zip(queries, digests, strict=True)}
    added = 0
    if rows:
        statement = insert(_queries).values(list(rows.values())).on_conflict_do_nothing()
        added = len(connection.execute(statement.returning(_queries.c.id)).all())
    known = connection.execute(
        select(_queries.c.prompt, _queries.c.seed, _queries.c.id, _queries.c.image_sha256)
        .where(_queries.c.model_id == header.model_id)
    ).all()
    by_key = {(row.prompt, row.seed): row for row in known}
    for query, digest in zip(queries, digests, strict=True):
        if by_key[query.prompt, query.seed].image_sha256 != digest:
            raise LabelsNotUsable(f"the query {query.prompt!r} with seed {query.seed} exists with another image")
    return [by_key[query.prompt, query.seed].id for query in queries], added


def _ranking_row(header: SnapshotHeader, query: SnapshotQuery, query_id: uuid.UUID) -> dict[str, Any]:
    return {
        "id": _identity(str(query_id), header.teacher_id, query.candidate_set), "query_id": query_id,
        "model_id": header.model_id, "teacher_id": header.teacher_id, "candidate_set": query.candidate_set,
        "n": int(query.tau.shape[0]), "item_ids": query.item_ids.astype("<i8").tobytes(),
        "tau": query.tau.astype("<f4").tobytes(), "standard_error": query.standard_error.astype("<f4").tobytes(),
        "tau_halves": None if query.tau_halves is None else query.tau_halves.astype("<f4").tobytes(),
        "samples": None if query.samples is None else query.samples.astype("<i4").tobytes(),
        "draws": query.draws, "job_id": None,
    }


def _identity(*parts: str) -> uuid.UUID:
    return uuid.uuid5(_NAMESPACE, "\x00".join(parts))


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads((path / METADATA).read_text())
    except (OSError, ValueError) as error:
        raise LabelsNotUsable(f"there is no readable label snapshot in {path}: {error}", path=path) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise LabelsNotUsable(f"{path / METADATA} is not of format {FORMAT}", path=path)
    return document


def _samples_entry(samples: npt.NDArray[np.int32] | None) -> dict[str, Any]:
    """How an entry says it: one number where all items had the same, else a place in the array ``samples``."""
    if samples is None:
        return {}
    equal = samples.size > 0 and bool((samples == samples[0]).all())
    return {"samples": int(samples[0]) if equal else "array"}


def _pack(rows: Sequence[FloatArray]) -> tuple[npt.NDArray[np.float16], FloatArray]:
    """Rows end to end as half floats, each divided by its largest magnitude; the divisors [rows]."""
    peaks = [float(np.nanmax(np.abs(row))) if row.size and not np.isnan(row).all() else 0.0 for row in rows]
    # Scaled up by 2^15: half precision then keeps three digits over nine decades instead of four.
    scales = np.asarray([peak / 32768.0 if peak > 0 else 1.0 for peak in peaks], dtype=np.float64)
    packed = [(row / scale).astype(np.float16) for row, scale in zip(rows, scales, strict=True)]
    values = np.concatenate(packed) if packed else np.empty(0, dtype=np.float16)
    return values, scales.astype(np.float32)


def _unpack(values: npt.NDArray[np.float16], scales: FloatArray, lengths: Sequence[int]) -> list[FloatArray]:
    ends = np.cumsum(lengths)
    return [values[end - length : end].astype(np.float32) * scale
            for end, length, scale in zip(ends, lengths, scales, strict=True)]
