"""Takes back what went wrong: leases that ran out, jobs whose time is up.

Why it exists: a worker that dies says nothing. Its lease ends by the database's clock and this returns the
job to the queue, or to the dead ones after its last attempt.
"""

from __future__ import annotations

from byline import telemetry
from byline.failpoints import failpoint
from byline.jobs.store import JobStore

log = telemetry.get_logger(__name__)

_BATCH = 100


def reconcile(store: JobStore) -> int:
    """One pass; returns how many jobs were changed. Raises ``DatabaseUnavailable``."""
    changed = 0
    while expired := store.expire_leases(_BATCH):
        if expired:
            failpoint("dispatcher.after_expiry")
        changed += len(expired)
        telemetry.LEASES_EXPIRED.inc(len(expired))
        for job in expired:
            log.warning(
                "lease_expired", job_id=str(job.id), stage=job.stage.value, attempt=job.attempt, state=job.state.value
            )
        if len(expired) < _BATCH:
            break
    while ended := store.expire_jobs(_BATCH):
        changed += len(ended)
        for job in ended:
            log.warning("time_is_up", job_id=str(job.id), stage=job.stage.value, state=job.state.value)
        if len(ended) < _BATCH:
            break
    return changed
