"""The stage runner on the real store: what each way of ending a stage does to the job."""

from __future__ import annotations

import threading
import time

import pytest
from sqlalchemy import text

from byline.db.listen import JOBS, Listener
from byline.errors import DatabaseUnavailable, InvalidRequest, WorkerStopping
from byline.jobs import Stage, State, Tier
from byline.jobs.runner import Outcome, RunOutcome, StageRunner

PATIENCE_S = 60


@pytest.fixture
def runner(store) -> StageRunner:
    return StageRunner(store, "w", 30, time.monotonic, heartbeat_s=0.02)


def until_it_raises(beat) -> None:
    """A stage that works until it is told to stop."""
    deadline = time.monotonic() + PATIENCE_S
    pause = threading.Event()
    while time.monotonic() < deadline:
        beat.check()
        pause.wait(0.01)
    raise AssertionError("nobody stopped the stage")


def test_a_stage_that_returns_has_its_result_written(runner, store, new_job):
    job, _ = store.create(new_job(tier=Tier.VERIFIED))
    outcome = runner.run(str(job.id), Stage.LOOKUP, lambda claim, beat: {"worker": claim.worker_id}, "release-1")
    assert outcome is RunOutcome.COMPLETED
    assert store.results(job.id)[Stage.LOOKUP].result == {"worker": "w"}
    assert (store.find(job.id).stage, store.find(job.id).release_id) == (Stage.VERIFY, "release-1")


def test_a_message_delivered_three_times_takes_effect_once(runner, store, new_job):
    job, _ = store.create(new_job())
    runs = []

    def work(claim, beat):
        runs.append(claim.fence)
        return {}

    outcomes = [runner.run(job.id, Stage.LOOKUP, work) for _ in range(3)]
    assert outcomes == [RunOutcome.COMPLETED, RunOutcome.DUPLICATE, RunOutcome.DUPLICATE]
    assert runs == [1]


def test_progress_reaches_watchers_while_the_stage_runs(runner, store, new_job, jobs_database_url):
    job, _ = store.create(new_job())
    seen, stop, connected = threading.Event(), threading.Event(), threading.Event()

    def on_event(channel: str, payload: str) -> None:
        if payload == str(job.id) and store.find(job.id).progress_done == 7:
            seen.set()

    listener = Listener(jobs_database_url, [JOBS], stop, on_event, connected.set)
    listener.start()
    assert connected.wait(PATIENCE_S)

    def work(claim, beat):
        beat.progress(7, 10)
        assert seen.wait(PATIENCE_S)
        return {}

    assert runner.run(job.id, Stage.LOOKUP, work) is RunOutcome.COMPLETED
    stop.set()
    listener.join(PATIENCE_S)


def test_progress_is_written_long_before_the_next_heartbeat(store, new_job):
    """A watcher of a slow stage sees it move, also with the leases of a minute that slow stages have."""
    job, _ = store.create(new_job())
    seen = threading.Event()

    def look() -> None:
        pause = threading.Event()
        while not seen.is_set():
            if store.find(job.id).progress_done == 7:
                seen.set()
            pause.wait(0.05)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()

    def work(claim, beat):
        beat.progress(7, 10)
        assert seen.wait(15), "only the heartbeat, 100 s away, would have written it"
        return {}

    outcome = StageRunner(store, "w", 300, time.monotonic, heartbeat_s=100).run(job.id, Stage.LOOKUP, work)
    seen.set()
    watcher.join(10)
    assert outcome is RunOutcome.COMPLETED


def test_a_cancelled_stage_stops_at_its_next_check(runner, store, new_job):
    job, _ = store.create(new_job())

    def work(claim, beat):
        store.cancel("p", job.id)
        until_it_raises(beat)

    assert runner.run(job.id, Stage.LOOKUP, work) is RunOutcome.CANCELLED
    assert store.find(job.id).state is State.CANCELLED


def test_a_stage_without_progress_hears_of_its_cancellation_long_before_the_next_heartbeat(store, new_job):
    job, _ = store.create(new_job())

    def work(claim, beat):
        store.cancel("p", job.id)
        until_it_raises(beat)

    begun = time.monotonic()
    outcome = StageRunner(store, "w", 3600, time.monotonic, heartbeat_s=1200).run(job.id, Stage.LOOKUP, work)
    assert outcome is RunOutcome.CANCELLED and store.find(job.id).state is State.CANCELLED
    assert time.monotonic() - begun < 30, "seconds, not a third of the lease"


def test_a_stage_whose_lease_was_lost_stops_and_writes_nothing(runner, store, new_job, let_pass):
    job, _ = store.create(new_job())

    def work(claim, beat):
        store.cancel("p", job.id)
        store.acknowledge_cancel(claim)  # stands for another worker that ended the job
        until_it_raises(beat)

    # The cancellation may be seen before the loss is: either way the job is not touched again.
    assert runner.run(job.id, Stage.LOOKUP, work) in (RunOutcome.LEASE_LOST, RunOutcome.CANCELLED)
    assert [event.to_state for event in store.events(job.id)][-1] is State.CANCELLED


def test_a_stage_that_never_checks_still_cannot_write_after_losing_its_lease(runner, store, new_job, let_pass):
    job, _ = store.create(new_job())
    slow = StageRunner(store, "slow", 30, time.monotonic, heartbeat_s=3600)

    def work(claim, beat):
        let_pass(job.id, "lease_until")
        assert runner.run(job.id, Stage.LOOKUP, lambda claim, beat: {"by": "other"}) is RunOutcome.COMPLETED
        return {"by": "zombie"}

    assert slow.run(job.id, Stage.LOOKUP, work) is RunOutcome.LEASE_LOST
    assert store.results(job.id)[Stage.LOOKUP].result == {"by": "other"}


def test_a_stopping_worker_gives_its_job_back_uncounted(store, new_job):
    stop = threading.Event()
    runner = StageRunner(store, "w", 30, time.monotonic, heartbeat_s=0.02, stop=stop)
    job, _ = store.create(new_job())

    def work(claim, beat):
        stop.set()
        beat.check()
        raise AssertionError("check must raise")

    assert runner.run(job.id, Stage.LOOKUP, work) is RunOutcome.RELEASED
    assert (store.find(job.id).state, store.find(job.id).attempt) == (State.QUEUED, 0)


def test_a_stage_may_say_itself_that_its_worker_is_stopping(runner, store, new_job):
    job, _ = store.create(new_job())

    def work(claim, beat):
        raise WorkerStopping("model unloading")

    assert runner.run(job.id, Stage.LOOKUP, work) is RunOutcome.RELEASED


def test_an_invalid_request_fails_at_once(runner, store, new_job):
    job, _ = store.create(new_job())

    def work(claim, beat):
        raise InvalidRequest("image", "is broken")

    assert runner.run(job.id, Stage.LOOKUP, work) is RunOutcome.FAILED
    assert store.find(job.id).error["message"] == "image: is broken"


def test_an_unknown_error_is_retried_and_does_not_leak_its_text(runner, store, new_job):
    job, _ = store.create(new_job())

    def work(claim, beat):
        raise ValueError("/secret/path")

    assert runner.run(job.id, Stage.LOOKUP, work) is RunOutcome.RETRIED
    error = store.find(job.id).error
    assert "secret" not in str(error)
    assert error["metadata"]["kind"] == "ValueError"
    assert error["metadata"]["error_id"] in error["message"]


def test_a_refusal_in_the_completing_transaction_is_a_failed_attempt(runner, store, new_job, engine):
    job, _ = store.create(new_job())

    def also(connection):
        connection.execute(text("INSERT INTO corpora (id) VALUES ('x')"))
        raise ValueError("refused")

    assert runner.run(job.id, Stage.LOOKUP, lambda claim, beat: Outcome({}, also)) is RunOutcome.RETRIED
    assert store.results(job.id) == {}


def test_the_end_of_a_stage_waits_for_a_database_that_is_away(runner, store, new_job, monkeypatch):
    job, _ = store.create(new_job())
    complete, failures = store.complete, [DatabaseUnavailable("away"), DatabaseUnavailable("away")]

    def flaky(*arguments):
        if failures:
            raise failures.pop()
        return complete(*arguments)

    monkeypatch.setattr(store, "complete", flaky)
    assert runner.run(job.id, Stage.LOOKUP, lambda claim, beat: {}) is RunOutcome.COMPLETED
    assert store.find(job.id).state is State.SUCCEEDED


def test_a_heart_that_cannot_reach_the_database_beats_on(runner, store, new_job, monkeypatch):
    job, _ = store.create(new_job())
    heartbeat, failed, beaten = store.heartbeat, threading.Event(), threading.Event()

    def flaky(*arguments):
        if not failed.is_set():
            failed.set()
            raise DatabaseUnavailable("away")
        answer = heartbeat(*arguments)
        beaten.set()
        return answer

    monkeypatch.setattr(store, "heartbeat", flaky)

    def work(claim, beat):
        assert beaten.wait(PATIENCE_S)
        beat.check()
        return {}

    assert runner.run(job.id, Stage.LOOKUP, work) is RunOutcome.COMPLETED


def test_a_stage_clears_up_once_its_end_is_written_and_not_when_it_is_to_run_again(runner, store, new_job):
    done, again = store.create(new_job())[0], store.create(new_job())[0]
    cleared: list[State] = []

    def work(claim, beat):
        def also(connection):
            if claim.job.id == again.id:
                raise RuntimeError("the write failed")

        return Outcome({}, also=also, after=lambda: cleared.append(store.find(claim.job.id).state))

    assert runner.run(done.id, Stage.LOOKUP, work) is RunOutcome.COMPLETED
    assert runner.run(again.id, Stage.LOOKUP, work) is RunOutcome.RETRIED
    assert cleared == [State.SUCCEEDED]
