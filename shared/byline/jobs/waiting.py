"""Several short jobs at once: claim what waits, keep the leases, complete together.

Why it exists: a lookup is a few milliseconds of work, and a transaction of its own for each claim and each result costs
more than that. The statements are those of ``leases`` over sets: the same conditions, fences and events. Only jobs
that were never tried are taken together; one that failed or killed its worker before is claimed alone, by its own
doorbell, so that it cannot cost its neighbours their attempts.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, text

from byline.jobs.model import Claim
from byline.jobs.rows import COLUMNS, WAITED, Pins, claiming_jobs, pinning, to_claim
from byline.jobs.states import Stage, next_stage

# Projects are found by skipping through the index (stage, project_id, create_time), and of each only as many jobs are
# read as could be taken: the cost does not grow with the backlog. Projects take turns, as with doorbells.
#
# The claim need not be on disk before the work begins: should Postgres crash and forget it, the job is QUEUED again,
# and what its worker writes later finds neither fence nor owner. A completion is flushed, and with it all before it.
_CLAIM = claiming_jobs(f"""
WITH RECURSIVE projects AS (
    (SELECT project_id FROM jobs WHERE stage = :stage AND state = 'QUEUED' ORDER BY project_id LIMIT 1)
    UNION ALL
    SELECT (SELECT j.project_id FROM jobs j WHERE j.stage = :stage AND j.state = 'QUEUED'
                AND j.project_id > p.project_id ORDER BY j.project_id LIMIT 1)
    FROM projects p WHERE p.project_id IS NOT NULL
), waiting AS (
    SELECT j.id, row_number() OVER (ORDER BY j.turn, j.create_time, j.id) AS place FROM projects p, LATERAL (
        SELECT id, create_time, row_number() OVER (ORDER BY create_time, id) AS turn FROM jobs
        WHERE stage = :stage AND state = 'QUEUED' AND project_id = p.project_id AND attempt = 0
            AND cancel_requested_at IS NULL AND expire_time > now()
            AND (CAST(:pins AS jsonb) IS NULL OR jsonb_exists(CAST(:pins AS jsonb), model_id))
            AND (next_attempt_at IS NULL OR next_attempt_at <= now())
        ORDER BY create_time, id LIMIT :reach
    ) AS j
    WHERE NOT EXISTS (SELECT 1 FROM stage_controls WHERE stage_controls.stage = :stage AND paused)
), prior AS (
    SELECT jobs.id, waiting.place, COALESCE(jobs.next_attempt_at, jobs.update_time) AS since
    FROM jobs JOIN waiting USING (id)
    WHERE jobs.state = 'QUEUED' AND jobs.stage = :stage AND jobs.attempt = 0 AND jobs.cancel_requested_at IS NULL
    ORDER BY waiting.place LIMIT :most FOR UPDATE OF jobs SKIP LOCKED
), claimed AS (
    UPDATE jobs SET state = 'RUNNING', attempt = attempt + 1, fence = fence + 1, lease_owner = :worker,
        lease_until = now() + make_interval(secs => :lease),
        release_id = COALESCE(release_id, :release, CAST(:pins AS jsonb) ->> model_id),
        start_time = COALESCE(start_time, now()), next_attempt_at = NULL, progress_done = 0, progress_total = 0
    FROM prior WHERE jobs.id = prior.id
    RETURNING jobs.*, prior.place, prior.since
), noted AS (
    INSERT INTO job_events (job_id, from_state, to_state, stage, actor, fence, reason)
    SELECT id, 'QUEUED', state, stage, :worker, fence, 'claimed' FROM claimed
), lazily AS (
    SELECT set_config('synchronous_commit', 'off', true) WHERE EXISTS (SELECT 1 FROM claimed)
)
SELECT {COLUMNS}, {WAITED} FROM claimed LEFT JOIN lazily ON true ORDER BY place
""")  # noqa: S608

# What must hold of a job (its fence and owner, that it runs) is looked at under its row's lock; withdrawals are those
# committed when the statement begins, and whoever reads the answer leaves out later ones.
_SUCCEED = text("""
WITH asked AS (
    SELECT CAST(e->>'id' AS uuid) AS id, CAST(e->>'fence' AS bigint) AS fence, e->'result' AS result,
        e->'named' AS named
    FROM jsonb_array_elements(CAST(:done AS jsonb)) AS e
), held AS (
    SELECT j.id FROM jobs j JOIN asked a ON j.id = a.id AND j.fence = a.fence
    WHERE j.stage = :stage AND j.state = 'RUNNING' AND j.lease_owner = :worker AND NOT EXISTS (
        SELECT 1 FROM items WHERE withdrawn_at IS NOT NULL
            AND item_id IN (SELECT CAST(n AS bigint) FROM jsonb_array_elements_text(a.named) AS n)
    )
    ORDER BY j.id FOR UPDATE OF j
), changed AS (
    UPDATE jobs SET state = 'SUCCEEDED', error = NULL, lease_owner = NULL, lease_until = NULL, end_time = now(),
        next_attempt_at = NULL, dispatched_at = NULL
    FROM held WHERE jobs.id = held.id RETURNING jobs.id, jobs.stage, jobs.fence, jobs.release_id
), written AS (
    INSERT INTO job_results (job_id, stage, release_id, fence, result)
    SELECT c.id, c.stage, c.release_id, c.fence, a.result FROM changed c JOIN asked a USING (id)
), noted AS (
    INSERT INTO job_events (job_id, from_state, to_state, stage, actor, fence, reason)
    SELECT id, 'RUNNING', 'SUCCEEDED', stage, :worker, fence, 'completed' FROM changed
)
SELECT id FROM changed
""")

#: A claim, what its stage found, and the items that names.
Done = tuple[Claim, Mapping[str, Any], Sequence[int]]


def claim_waiting(
    connection: Connection, stage: Stage, *, worker_id: str, lease_s: float, release_id: Pins, most: int
) -> list[Claim]:
    """Take the leases of up to ``most`` jobs that wait for ``stage`` and were never tried, projects in turn."""
    parameters = {
        # Further than ``most``: another worker may just be taking the first ones.
        "stage": stage, "worker": worker_id, "lease": lease_s, "most": most, "reach": 4 * most,
        **pinning(release_id),
    }  # fmt: skip
    return [to_claim(row, worker_id) for row in connection.execute(_CLAIM, parameters).mappings()]


def complete_last(connection: Connection, done: Sequence[Done]) -> set[uuid.UUID]:
    """Write results of one worker's claims on their jobs' last stage, and end those jobs: one statement.

    Returns the ids written. Left out, with nothing changed, is a job whose lease was lost, that is being cancelled, has
    another stage before it, or names an item that was withdrawn: each of these goes the way of a single completion,
    which knows what to do about it.
    """
    last = [one for one in done if next_stage(one[0].stage, one[0].job.tier) is None]
    if not last:
        return set()
    first = last[0][0]
    # One JSON, not an array of them: an array's text escapes every quotation mark once more.
    asked = [
        {"id": str(claim.job.id), "fence": claim.fence, "result": dict(result), "named": list(named)}
        for claim, result, named in last
    ]
    parameters = {"stage": first.stage, "worker": first.worker_id, "done": json.dumps(asked)}
    return set(connection.execute(_SUCCEED, parameters).scalars())
