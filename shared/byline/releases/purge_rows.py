"""Withdrawn items out of the rows that named them: labels, stored answers, deltas, and their own descriptions.

Why it exists: "gone from every answer" is a filter; "gone" is this. What stays of an item is its id, its digest and
its creator, because a receipt must be able to name it and an addition of the same image must be refused. Rankings are
kept for ever, but for what they say of a withdrawn item: an array loses its entry, the rest keeps its bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, MappingResult, text

Ids = NDArray[np.int64]

#: Of the labels' tables: arrays of item ids, and the arrays that run beside them with their type.
_RANKINGS = {"tau": "<f4", "standard_error": "<f4", "samples": "<i4"}
_SHORTLISTS = ("nearest", "by_head", "explored")
_SCRUB = text(
    "UPDATE items SET caption = '', keywords = '[]'::jsonb, source = '', source_path = '', look = NULL,"
    " look_hash = NULL WHERE item_id = ANY(:ids) AND withdrawn_at IS NOT NULL"
)
_FORGET = text("DELETE FROM release_delta_items WHERE item_id = ANY(:ids)")
# An influence of a withdrawn item is dropped from stored results; how many were is kept, so that an answer still says
# that something was left out.
_RESULTS = text("""
UPDATE job_results r SET result = r.result
    || jsonb_build_object('influences', k.influences, 'candidates', k.candidates, 'purged_influences',
        coalesce((r.result->>'purged_influences')::int, 0)
        + jsonb_array_length(r.result->'influences') - jsonb_array_length(k.influences))
FROM (
    SELECT job_id, stage,
        (SELECT coalesce(jsonb_agg(e ORDER BY n), '[]'::jsonb) FROM jsonb_array_elements(result->'influences')
            WITH ORDINALITY AS x(e, n) WHERE NOT e->>'item_id' = ANY(:names)) AS influences,
        (SELECT coalesce(jsonb_agg(e ORDER BY n), '[]'::jsonb)
            FROM jsonb_array_elements(coalesce(result->'candidates', '[]'::jsonb))
            WITH ORDINALITY AS x(e, n) WHERE NOT e->>'item_id' = ANY(:names)) AS candidates
    FROM job_results s
    WHERE s.result ? 'influences' AND EXISTS (
        SELECT 1 FROM jsonb_array_elements((s.result->'influences') || coalesce(s.result->'candidates', '[]'::jsonb)) e
        WHERE e->>'item_id' = ANY(:names))
) k
WHERE r.job_id = k.job_id AND r.stage = k.stage
""")
_MODELS = text("SELECT id FROM models WHERE corpus_id = :corpus")


@dataclass(frozen=True)
class PurgedRows:
    """How many rows lost an entry, or went."""

    delta_items: int
    rankings: int
    shortlists: int
    results: int

    def to_json(self) -> dict[str, int]:
        """For the receipt."""
        return vars(self).copy()


def purge_rows(connection: Connection, corpus_id: str, item_ids: Sequence[int]) -> PurgedRows:
    """Remove the items from every row that names them, in the caller's transaction. They must be withdrawn."""
    ids = sorted(item_ids)
    gone = np.array(ids, dtype=np.int64)
    models = list(connection.execute(_MODELS, {"corpus": corpus_id}).scalars())
    delta = connection.execute(_FORGET, {"ids": ids}).rowcount
    # Those to be cut are found first: rows are not rewritten under an open cursor.
    cut = [dict(row) for row in _rankings(connection, models) if _names(row["item_ids"], gone)]
    rankings = sum(_cut_ranking(connection, row, gone) for row in cut)
    lists = [dict(row) for row in _shortlists(connection, models)]
    shortlists = sum(_cut_shortlist(connection, row, gone) for row in lists)
    results = connection.execute(_RESULTS, {"names": [str(item_id) for item_id in ids]}).rowcount
    connection.execute(_SCRUB, {"ids": ids})
    return PurgedRows(delta, rankings, shortlists, results)


def rows_naming(connection: Connection, corpus_id: str, item_ids: Sequence[int]) -> dict[str, int]:
    """How many rows of each kind still name one of the items; every value 0 once they are purged."""
    ids = sorted(item_ids)
    gone = np.array(ids, dtype=np.int64)
    models = list(connection.execute(_MODELS, {"corpus": corpus_id}).scalars())
    counts = {
        "delta_items": text("SELECT count(*) FROM release_delta_items WHERE item_id = ANY(:ids)"),
        "described_items": text(
            "SELECT count(*) FROM items WHERE item_id = ANY(:ids) AND (withdrawn_at IS NULL OR caption <> '')"
        ),
    }
    found = {name: int(connection.execute(query, {"ids": ids}).scalar_one()) for name, query in counts.items()}
    named = text(
        "SELECT count(*) FROM job_results s WHERE s.result ? 'influences' AND EXISTS (SELECT 1 FROM"
        " jsonb_array_elements((s.result->'influences') || coalesce(s.result->'candidates', '[]'::jsonb)) e"
        " WHERE e->>'item_id' = ANY(:names))"
    )
    found["results"] = int(connection.execute(named, {"names": [str(i) for i in ids]}).scalar_one())
    found["rankings"] = sum(_names(row["item_ids"], gone) for row in _rankings(connection, models))
    found["shortlists"] = sum(
        any(_names(row[column], gone) for column in _SHORTLISTS) for row in _shortlists(connection, models)
    )
    return found


def _rankings(connection: Connection, models: Sequence[str]) -> MappingResult:
    query = text(
        "SELECT id, item_ids, tau, standard_error, tau_halves, samples FROM rankings WHERE model_id = ANY(:models)"
    )
    return connection.execute(query.execution_options(yield_per=256), {"models": models}).mappings()


def _shortlists(connection: Connection, models: Sequence[str]) -> MappingResult:
    query = text(
        "SELECT s.query_id, s.candidate_set, s.nearest, s.by_head, s.explored FROM shortlists s"
        " JOIN queries q ON q.id = s.query_id WHERE q.model_id = ANY(:models)"
    )
    return connection.execute(query.execution_options(yield_per=256), {"models": models}).mappings()


def _names(held: object, gone: Ids) -> bool:
    return bool(np.isin(_ids(held), gone).any())


def _ids(held: object) -> Ids:
    return np.frombuffer(held, dtype="<i8") if isinstance(held, (bytes, memoryview)) else np.empty(0, np.int64)


def _cut_ranking(connection: Connection, row: Mapping[str, object], gone: Ids) -> int:
    """Rewrite one ranking without the items; 1 if it named any. One that names nothing else is removed."""
    ids = _ids(row["item_ids"])
    keep = ~np.isin(ids, gone)
    if keep.all():
        return 0
    if not keep.any():
        connection.execute(text("DELETE FROM rankings WHERE id = :id"), {"id": row["id"]})
        return 1
    values: dict[str, object] = {"id": row["id"], "n": int(keep.sum()), "item_ids": ids[keep].tobytes()}
    for column, kind in _RANKINGS.items():
        held = row[column]
        values[column] = None if held is None else np.frombuffer(held, dtype=kind)[keep].tobytes()  # type: ignore[call-overload]
    halves = row["tau_halves"]
    if halves is not None:
        halves = np.frombuffer(halves, dtype="<f4").reshape(2, -1)[:, keep].tobytes()  # type: ignore[call-overload]
    connection.execute(
        text(
            "UPDATE rankings SET n = :n, item_ids = :item_ids, tau = :tau, standard_error = :standard_error,"
            " samples = :samples, tau_halves = :halves WHERE id = :id"
        ),
        values | {"halves": halves},
    )
    return 1


def _cut_shortlist(connection: Connection, row: Mapping[str, object], gone: Ids) -> int:
    lists = {column: _ids(row[column]) for column in _SHORTLISTS}
    if not any(np.isin(ids, gone).any() for ids in lists.values()):
        return 0
    values = {column: ids[~np.isin(ids, gone)].tobytes() for column, ids in lists.items()}
    connection.execute(
        text(
            "UPDATE shortlists SET nearest = :nearest, by_head = :by_head, explored = :explored"
            " WHERE query_id = :query AND candidate_set = :name"
        ),
        {**values, "query": row["query_id"], "name": row["candidate_set"]},
    )
    return 1
