"""The job store against a small model: whatever the order of calls, both agree (Hypothesis, real Postgres).

Every way a job can be taken, kept, ended, lost and taken back is a rule: alone and in batches, by doorbells that come
again, after leases that ran out, after a crash of Postgres that forgot a claim. Promises 1 to 4 are what must hold at
every step, and the checker of the chaos runs reads the events at the end.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule, run_state_machine_as_test
from sqlalchemy import text

from byline.chaos.checker import check
from byline.chaos.collect import collect
from byline.chaos.history import Acknowledged, History
from byline.errors import BylineError, IllegalTransition, JobNotCancellable, JobNotRetryable, LeaseLost
from byline.jobs import TERMINAL, Claim, NewJob, Stage, State, Tier, Verification, check_transition, next_stage
from byline.jobs.store import JobStore

MAX_ATTEMPTS = 2


@dataclass
class Model:
    """What one job must be."""

    tier: Tier
    verification: Verification
    state: State = State.QUEUED
    stage: Stage = Stage.LOOKUP
    attempt: int = 0
    fence: int = 0
    owner: str | None = None
    dead: bool = False
    request: str = ""
    lease_over: bool = False
    waiting: bool = False
    results: dict[Stage, int] = field(default_factory=dict)
    #: Stages whose worker completed them, with its fence and name: only its own repeat is accepted.
    completed: dict[Stage, tuple[int, str]] = field(default_factory=dict)

    def claimable(self, stage: Stage) -> bool:
        free = self.state is State.QUEUED and not self.waiting
        return (free or (self.state is State.RUNNING and self.lease_over)) and (
            self.stage is stage and self.attempt < MAX_ATTEMPTS
        )

    def held_by(self, claim: Claim) -> bool:
        live = self.state in (State.RUNNING, State.CANCELLING)
        mine = self.fence == claim.fence and self.owner == claim.worker_id
        return live and mine and self.stage is claim.stage

    def claimed_by(self, worker: str) -> None:
        self.state, self.lease_over, self.owner = State.RUNNING, False, worker
        self.attempt, self.fence = self.attempt + 1, self.fence + 1

    def end_failed(self) -> None:
        if self.stage is not Stage.LOOKUP and self.verification is Verification.BEST_EFFORT:
            self.results[self.stage] = self.fence
            self.state = State.SUCCEEDED
        else:
            self.state = State.FAILED

    def retry(self) -> None:
        if self.attempt >= MAX_ATTEMPTS:
            self.end_failed()
            self.dead = self.state is State.FAILED
        else:
            self.state, self.waiting = State.QUEUED, True


def store_machine(store: JobStore, engine) -> type[RuleBasedStateMachine]:
    class StoreMachine(RuleBasedStateMachine):
        jobs = Bundle("jobs")
        claims = Bundle("claims")

        def __init__(self) -> None:
            super().__init__()
            self.models: dict[object, Model] = {}
            self.made = 0
            self._sql("TRUNCATE jobs CASCADE")

        def _sql(self, statement: str, **values: object) -> None:
            with engine.begin() as connection:
                connection.execute(text(statement), values)

        @rule(target=jobs, tier=st.sampled_from(Tier), verification=st.sampled_from(Verification))
        def create(self, tier, verification):
            self.made += 1
            new = NewJob(
                project_id="p", request_id=str(self.made), model_id="m", prompt="a cat", image_sha256="0",
                tier=tier, verification=verification, max_attempts=MAX_ATTEMPTS,
            )  # fmt: skip
            job, created = store.create(new)
            assert created
            assert store.create(new) == (job, False)
            self.models[job.id] = Model(tier, verification, request=new.request_id)
            return job.id

        @rule(target=jobs, job_id=jobs)
        def retry_the_dead(self, job_id):
            model = self.models[job_id]
            if not model.dead:
                with pytest.raises(JobNotRetryable):
                    store.retry_dead(job_id)
                return multiple()
            again = store.retry_dead(job_id)
            assert store.retry_dead(job_id).id == again.id, "trying again twice makes one job"
            if again.id in self.models:
                return multiple()
            self.models[again.id] = Model(model.tier, model.verification, request=again.request_id)
            return again.id

        @rule(target=claims, job_id=jobs, stage=st.sampled_from([None, None, None, *Stage]), worker=st.integers(0, 2))
        def claim(self, job_id, stage, worker):
            model = self.models[job_id]
            stage = stage or model.stage
            claim = store.claim(job_id, stage, f"w{worker}", 3600)
            assert (claim is not None) == model.claimable(stage)
            if claim is None:
                return multiple()
            model.claimed_by(f"w{worker}")
            assert claim.fence == model.fence
            return claim

        @rule(target=claims, worker=st.integers(0, 2), most=st.integers(1, 3))
        def take_what_waits(self, worker, most):
            waiting = {
                job_id for job_id, model in self.models.items() if model.state is State.QUEUED and model.attempt == 0
                and model.stage is Stage.LOOKUP and not model.waiting
            }  # fmt: skip
            taken = store.claim_waiting(Stage.LOOKUP, f"w{worker}", 3600, None, most)
            assert len(taken) == min(most, len(waiting))
            assert {claim.job.id for claim in taken} <= waiting
            for claim in taken:
                self.models[claim.job.id].claimed_by(f"w{worker}")
            return multiple(*taken)

        @rule(several=st.lists(claims, min_size=1, max_size=4))
        def complete_together(self, several):
            first = several[0]
            mine = {
                claim.job.id: claim for claim in several
                if (claim.stage, claim.worker_id) == (first.stage, first.worker_id)
            }  # fmt: skip
            expected = {
                job_id for job_id, claim in mine.items() if self.models[job_id].held_by(claim)
                and self.models[job_id].state is State.RUNNING and next_stage(claim.stage, claim.job.tier) is None
            }  # fmt: skip
            done = [(claim, {"fence": claim.fence}, ()) for claim in mine.values()]
            assert store.complete_last(done) == expected
            for job_id in expected:
                self.models[job_id].results[first.stage] = mine[job_id].fence
                self.models[job_id].completed[first.stage] = (mine[job_id].fence, first.worker_id)
                self.models[job_id].state = State.SUCCEEDED

        @rule(target=claims, forgotten=claims)
        def let_a_crash_of_postgres_forget_the_claim(self, forgotten):
            """Claims are not flushed: the last one may be gone, with its event; another worker gets the same fence."""
            job_id = forgotten.job.id
            model = self.models[job_id]
            last = store.events(job_id)[-1]
            fresh = (last.from_state, last.to_state) == (State.QUEUED, State.RUNNING)
            if model.state is not State.RUNNING or not model.held_by(forgotten) or not fresh:
                return multiple()
            with engine.begin() as connection:
                connection.execute(text("SET LOCAL session_replication_role = replica"))  # as recovery, past triggers
                for statement in (
                    "UPDATE jobs SET state = 'QUEUED', attempt = attempt - 1, fence = fence - 1, lease_owner = NULL,"
                    " lease_until = NULL WHERE id = :id",
                    "DELETE FROM job_events WHERE id = (SELECT max(id) FROM job_events WHERE job_id = :id)",
                ):
                    connection.execute(text(statement), {"id": job_id})
            model.state, model.attempt, model.fence = State.QUEUED, model.attempt - 1, model.fence - 1
            model.owner, model.lease_over, model.waiting = None, False, False
            claim = store.claim(job_id, model.stage, "after the crash", 3600)
            model.claimed_by("after the crash")
            assert claim is not None and claim.fence == model.fence
            return claim

        @rule(claim=claims)
        def heartbeat(self, claim):
            model = self.models[claim.job.id]
            if not model.held_by(claim):
                with pytest.raises(LeaseLost):
                    store.heartbeat(claim, 1, 2, 3600)
                return
            assert store.heartbeat(claim, 1, 2, 3600) == (model.state is State.CANCELLING)
            model.lease_over = False

        @rule(claim=claims)
        def complete(self, claim):
            model = self.models[claim.job.id]
            if not model.held_by(claim):
                if model.completed.get(claim.stage) == (claim.fence, claim.worker_id):
                    store.complete(claim, {"fence": -1})  # a repeat: accepted, changes nothing
                    return
                with pytest.raises(LeaseLost):
                    store.complete(claim, {"fence": -1})
                return
            store.complete(claim, {"fence": claim.fence})
            if model.state is State.CANCELLING:
                model.state = State.CANCELLED
                return
            model.results[model.stage] = claim.fence
            model.completed[model.stage] = (claim.fence, claim.worker_id)
            following = next_stage(model.stage, model.tier)
            if following is None:
                model.state = State.SUCCEEDED
            else:
                model.state, model.stage, model.attempt, model.waiting = State.QUEUED, following, 0, False

        @rule(claim=claims, retry=st.booleans())
        def fail(self, claim, retry):
            model = self.models[claim.job.id]
            if not model.held_by(claim):
                with pytest.raises(LeaseLost):
                    store.fail(claim, BylineError("x"), retry)
                return
            store.fail(claim, BylineError("x"), retry)
            if model.state is State.CANCELLING:
                model.state = State.CANCELLED
            elif retry:
                model.retry()
            else:
                model.end_failed()

        @rule(claim=claims)
        def give_back(self, claim):
            model = self.models[claim.job.id]
            if not model.held_by(claim):
                with pytest.raises(LeaseLost):
                    store.release(claim)
                return
            store.release(claim)
            if model.state is State.CANCELLING:
                model.state = State.CANCELLED
            else:
                model.state, model.attempt, model.waiting = State.QUEUED, model.attempt - 1, False

        @rule(claim=claims)
        def acknowledge_cancel(self, claim):
            model = self.models[claim.job.id]
            if not model.held_by(claim) or model.state is State.RUNNING:
                with pytest.raises((LeaseLost, IllegalTransition)):
                    store.acknowledge_cancel(claim)
                return
            store.acknowledge_cancel(claim)
            model.state = State.CANCELLED

        @rule(job_id=jobs)
        def cancel(self, job_id):
            model = self.models[job_id]
            if model.state in (State.SUCCEEDED, State.FAILED):
                with pytest.raises(JobNotCancellable):
                    store.cancel("p", job_id)
                return
            store.cancel("p", job_id)
            after = {State.QUEUED: State.CANCELLED, State.RUNNING: State.CANCELLING}
            model.state = after.get(model.state, model.state)

        @rule(job_id=jobs)
        def let_the_lease_run_out(self, job_id):
            self._sql("UPDATE jobs SET lease_until = now() - interval '1 s' WHERE id = :id", id=job_id)
            self.models[job_id].lease_over = True

        @rule(job_id=jobs)
        def let_the_delay_pass(self, job_id):
            self._sql("UPDATE jobs SET next_attempt_at = NULL WHERE id = :id", id=job_id)
            self.models[job_id].waiting = False

        @rule()
        def expire_leases(self):
            store.expire_leases()
            for model in self.models.values():
                if model.lease_over and model.state is State.CANCELLING:
                    model.state = State.CANCELLED
                elif model.lease_over and model.state is State.RUNNING:
                    model.retry()

        @rule(job_id=jobs)
        def let_the_job_time_out(self, job_id):
            model = self.models[job_id]
            self._sql("UPDATE jobs SET expire_time = now() - interval '1 s' WHERE id = :id", id=job_id)
            store.expire_jobs()
            if model.state is State.CANCELLING:
                model.state = State.CANCELLED
            elif model.state not in TERMINAL:
                model.end_failed()

        @invariant()
        def the_store_agrees_with_the_model(self):
            for job in store.list("p", page_size=1000):
                model = self.models[job.id]
                assert (job.state, job.stage, job.attempt, job.fence) == (
                    model.state, model.stage, model.attempt, model.fence,
                )  # fmt: skip
                assert (job.lease_owner is not None) == (job.state in (State.RUNNING, State.CANCELLING))
                assert (job.end_time is not None) == (job.state in TERMINAL)

        def teardown(self):
            told = [
                Acknowledged(model.request, "p", str(job_id), 0.0)
                for job_id, model in self.models.items() if model.state in TERMINAL
            ]  # fmt: skip
            verdict = check(History.of([*told, *collect(engine)], {}))
            assert not [found for found in verdict.violations if found.promise in (1, 2, 3, 4)]
            for job_id, model in self.models.items():
                events = store.events(job_id)
                for before, after in zip([None, *events], events, strict=False):
                    assert after.from_state == (before.to_state if before else None)
                    if before:
                        check_transition(before.to_state, after.to_state)
                assert events[-1].to_state is model.state
                assert sum(event.to_state in TERMINAL for event in events) <= 1
                assert {stage: found.fence for stage, found in store.results(job_id).items()} == model.results

    return StoreMachine


def test_the_store_does_what_the_model_says_in_any_order_of_calls(engine):
    store = JobStore(engine, bounds={}, rng=random.Random(3))
    run_state_machine_as_test(
        store_machine(store, engine),
        settings=settings(
            max_examples=25,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
