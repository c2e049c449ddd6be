"""kill -9 between any two steps of a job's path: Create, doorbell, claim, completion, taking back; nothing is lost.

Each step runs in a process of its own with one failpoint armed, and must die by it. What is left in Postgres is then
carried on by others, and the checker of the chaos runs judges the history.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from byline.chaos.checker import check
from byline.chaos.collect import collect
from byline.chaos.history import Acknowledged, History
from byline.failpoints import NAMES
from byline.jobs import Stage, State
from byline.jobs.runner import RunOutcome, StageRunner

ROOT = Path(__file__).resolve().parents[3]

#: A worker or a dispatcher reduced to the step that is to be interrupted. One process imports everything and forks for
#: each line it reads (failpoint, step, database); it answers with the signal that ended the fork.
PROGRAM = """
import os, random, sys, time
from byline.db import make_engine
from byline.jobs import Stage
from byline.jobs.batch import BatchRunner
from byline.jobs.store import JobStore
from services.dispatcher.dispatch import Dispatch
from services.dispatcher.reconcile import reconcile

def take(step, url):
    store = JobStore(make_engine(url, 3), {}, rng=random.Random(1))
    runner = BatchRunner(store, f"dying:{os.getpid()}", 30, time.monotonic)
    work = lambda claim, beat: {"release_id": "r1"}
    if step == "doorbell":
        runner.run(store.list("p")[0].id, Stage.LOOKUP, work, "r1")
    elif step == "waiting":
        runner.run_waiting(Stage.LOOKUP, work, "r1")
    elif step == "dispatch":
        Dispatch(store, lambda doorbell: None, lambda: False, grace_s={}).step()
    elif step == "reconcile":
        reconcile(store)

for line in sys.stdin:
    failpoint, step, url = line.split()
    pid = os.fork()
    if pid == 0:
        try:
            os.environ["BYLINE_FAILPOINTS"] = f"{failpoint}=kill"
            take(step, url)
        finally:
            os._exit(0)
    print(os.WTERMSIG(os.waitpid(pid, 0)[1]), flush=True)
"""

DEATHS = [
    ("jobs.after_claim", "doorbell"), ("jobs.before_complete", "doorbell"), ("jobs.in_complete", "doorbell"),
    ("jobs.after_complete", "doorbell"), ("jobs.after_claim", "waiting"), ("jobs.before_complete", "waiting"),
    ("jobs.after_complete", "waiting"), ("dispatcher.after_mark", "dispatch"), ("dispatcher.after_ring", "dispatch"),
    ("dispatcher.after_expiry", "reconcile"),
]  # fmt: skip


@pytest.fixture(scope="module")
def die_at() -> Iterator[Callable[[str, str, str], None]]:
    """Take a step in a process that is killed at a failpoint; fails if it was not."""
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "shared", "protos"))
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": paths},
    ) as stage:  # fmt: skip
        assert stage.stdin is not None and stage.stdout is not None

        def die(failpoint: str, step: str, url: str) -> None:
            stage.stdin.write(f"{failpoint} {step} {url}\n")
            stage.stdin.flush()
            assert int(stage.stdout.readline()) == signal.SIGKILL, f"{step} did not die at {failpoint}"

        yield die
        stage.stdin.close()


@pytest.mark.parametrize(("failpoint", "step"), DEATHS)
def test_a_process_killed_there_costs_an_attempt_at_most(
    failpoint, step, die_at, engine, jobs_database_url, store, new_job,
):
    job, _ = store.create(new_job("one"))
    told = Acknowledged("one", "p", str(job.id), 0.0)
    if step == "reconcile":
        store.claim(job.id, Stage.LOOKUP, "silent", 30, "r1")
        _forget_the_lease(engine)
    die_at(failpoint, step, jobs_database_url)
    left = store.find(job.id)
    assert (left.state is State.SUCCEEDED) == (failpoint == "jobs.after_complete"), "what was committed stays"
    _forget_the_lease(engine)
    store.expire_leases()
    with engine.begin() as connection:
        connection.execute(text("UPDATE jobs SET next_attempt_at = NULL, dispatched_at = NULL"))
    outcome = StageRunner(store, "next", 30, iter(range(1000)).__next__).run(
        job.id, Stage.LOOKUP, lambda claim, beat: {"release_id": "r1"}, "r1"
    )
    assert outcome is (RunOutcome.DUPLICATE if left.state is State.SUCCEEDED else RunOutcome.COMPLETED)
    assert store.find(job.id).state is State.SUCCEEDED and store.find(job.id).attempt <= 2
    verdict = check(History.of([told, *collect(engine)], {}))
    assert verdict.passed, verdict.violations


def test_every_failpoint_of_a_jobs_path_is_tried_here_or_in_the_gateways_test():
    tried = {failpoint for failpoint, _ in DEATHS} | {"gateway.before_commit", "gateway.after_commit"}
    assert tried == {name for name in NAMES if name.partition(".")[0] in ("jobs", "dispatcher", "gateway")}


def _forget_the_lease(engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE jobs SET lease_until = now() - interval '1 s' WHERE lease_until IS NOT NULL"))


def test_a_repeat_after_a_gateway_died_unanswered_gives_the_same_job(store, new_job):
    """What ``gateway.after_commit`` leaves behind: the row without the acknowledgement."""
    job, created = store.create(new_job("unanswered"))
    assert created and store.create(new_job("unanswered")) == (job, False)
    assert uuid.UUID(str(job.id))
