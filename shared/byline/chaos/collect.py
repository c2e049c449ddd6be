"""What Postgres holds at the end of a run, as history.

Why it exists: the checker sees values only; the three statements that read them stand here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sqlalchemy import Connection, Engine, text

from byline.chaos.history import Change, Entry, JobFacts, Result

_JOBS = text("""
    SELECT id::text, project_id, request_id, kind, tier, state, release_id, error->>'reason' AS reason
    FROM jobs ORDER BY create_time, id
""")
_CHANGES = text("""
    SELECT job_id::text, from_state, to_state, stage, actor, fence, reason FROM job_events ORDER BY id
""")
_RESULTS = text("""
    SELECT job_id::text, stage, release_id, fence, result->>'release_id' AS names,
        ARRAY(SELECT (one->>'item_id')::bigint
              FROM jsonb_array_elements(COALESCE(result->'influences', '[]'::jsonb)) AS one) AS items
    FROM job_results ORDER BY created_at, job_id
""")


_DELTAS = text("SELECT release_id, item_id FROM release_delta_items ORDER BY release_id, item_id")


def with_deltas(engine: Engine, release_items: Mapping[str, frozenset[int]]) -> dict[str, frozenset[int]]:
    """The items of each release, with those that were added to it since it was built."""
    found = dict(release_items)
    with engine.connect() as connection:
        for release_id, item_id in connection.execute(_DELTAS):
            if release_id in found:
                found[release_id] |= {item_id}
    return found


def collect(engine: Engine) -> Iterator[Entry]:
    """Every job, change and result, in one snapshot of the database."""
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        yield from _collect(connection)


def _collect(connection: Connection) -> Iterator[Entry]:
    for row in connection.execute(_JOBS):
        yield JobFacts(*row)
    for row in connection.execute(_CHANGES):
        yield Change(*row)
    for row in connection.execute(_RESULTS):
        yield Result(row[0], row[1], row[2], row[3], row[4], tuple(row[5] or ()))
