"""The job store against a small model: whatever the order of calls, both agree (Hypothesis, real Postgres)."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule, run_state_machine_as_test
from sqlalchemy import text

from byline.errors import BylineError, IllegalTransition, JobNotCancellable, LeaseLost
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
    lease_over: bool = False
    waiting: bool = False
    results: dict[Stage, int] = field(default_factory=dict)

    def claimable(self, stage: Stage) -> bool:
        free = self.state is State.QUEUED and not self.waiting
        return (free or (self.state is State.RUNNING and self.lease_over)) and (
            self.stage is stage and self.attempt < MAX_ATTEMPTS
        )

    def held_by(self, claim: Claim) -> bool:
        live = self.state in (State.RUNNING, State.CANCELLING)
        return live and self.fence == claim.fence and self.stage is claim.stage

    def end_failed(self) -> None:
        if self.stage is not Stage.LOOKUP and self.verification is Verification.BEST_EFFORT:
            self.results[self.stage] = self.fence
            self.state = State.SUCCEEDED
        else:
            self.state = State.FAILED

    def retry(self) -> None:
        if self.attempt >= MAX_ATTEMPTS:
            self.end_failed()
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
            self.models[job.id] = Model(tier, verification)
            return job.id

        @rule(target=claims, job_id=jobs, stage=st.sampled_from([None, None, None, *Stage]), worker=st.integers(0, 2))
        def claim(self, job_id, stage, worker):
            model = self.models[job_id]
            stage = stage or model.stage
            claim = store.claim(job_id, stage, f"w{worker}", 3600)
            assert (claim is not None) == model.claimable(stage)
            if claim is None:
                return multiple()
            model.state, model.lease_over = State.RUNNING, False
            model.attempt, model.fence = model.attempt + 1, model.fence + 1
            assert claim.fence == model.fence
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
                if model.results.get(claim.stage) == claim.fence and not self._is_error(claim):
                    store.complete(claim, {"fence": -1})  # a repeat: accepted, changes nothing
                    return
                if model.results.get(claim.stage) != claim.fence:
                    with pytest.raises(LeaseLost):
                        store.complete(claim, {"fence": -1})
                return
            store.complete(claim, {"fence": claim.fence})
            if model.state is State.CANCELLING:
                model.state = State.CANCELLED
                return
            model.results[model.stage] = claim.fence
            following = next_stage(model.stage, model.tier)
            if following is None:
                model.state = State.SUCCEEDED
            else:
                model.state, model.stage, model.attempt, model.waiting = State.QUEUED, following, 0, False

        def _is_error(self, claim) -> bool:
            return "verification_error" in store.results(claim.job.id)[claim.stage].result

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
