"""Jobs: their states (pure), their values, the store in Postgres, and the loop a worker runs a stage in.

Why it exists: the promises of the README about jobs (never lost, one terminal state, effects once, a lost
lease changes nothing) are kept here and nowhere else.
"""

from byline.jobs.model import Claim, Job, JobEvent, NewJob, StageResult, fingerprint
from byline.jobs.states import TERMINAL, Kind, Stage, State, Tier, Verification, check_transition, next_stage

__all__ = [
    "TERMINAL",
    "Claim",
    "Job",
    "JobEvent",
    "Kind",
    "NewJob",
    "Stage",
    "StageResult",
    "State",
    "Tier",
    "Verification",
    "check_transition",
    "fingerprint",
    "next_stage",
]
