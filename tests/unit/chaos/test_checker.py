"""The checker of chaos runs: a history that keeps every promise passes, and one that breaks any is caught."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from byline.chaos.checker import check
from byline.chaos.history import Acknowledged, Change, Fault, History, JobFacts, Read, Result, Watched, Withdrawn

CREATED = Change("j", None, "QUEUED", "lookup", "client", 0, "created")
CLAIMED = Change("j", "QUEUED", "RUNNING", "lookup", "w1", 1, "claimed")
EXPIRED = Change("j", "RUNNING", "QUEUED", "lookup", "dispatcher", 1, "LEASE_EXPIRED")
AGAIN = Change("j", "QUEUED", "RUNNING", "lookup", "w2", 2, "claimed")
LOOKED_UP = Change("j", "RUNNING", "QUEUED", "lookup", "w2", 2, "lookup completed")
VERIFYING = Change("j", "QUEUED", "RUNNING", "verify", "v1", 3, "claimed")
DONE = Change("j", "RUNNING", "SUCCEEDED", "verify", "v1", 3, "completed")
ANSWER = Result("j", "lookup", "r1", 2, "r1", (1, 2, 3))
VERIFIED = Result("j", "verify", "r1", 3, "r1", (2, 1))

#: A verified job whose first worker fell silent, read twice, an item withdrawn in between.
GOOD = History(
    acknowledged=(Acknowledged("q", "p", "j", 1.0), Acknowledged("q", "p", "j", 1.5)),
    jobs=(JobFacts("j", "p", "q", "attribution", "VERIFIED", "SUCCEEDED", "r1"),),
    changes=(CREATED, CLAIMED, EXPIRED, AGAIN, LOOKED_UP, VERIFYING, DONE),
    results=(ANSWER, VERIFIED),
    reads=(Read("j", "RETRIEVED", "r1", (1, 2, 3), 2.0, 2.1), Read("j", "RETRIEVED", "r1", (1, 2), 6.0, 6.1)),
    withdrawn=(Withdrawn(3, 5.0),),
    faults=(Fault("redis_flushed", 1.2, 1.3),),
    watched=(Watched("j", ("QUEUED", "RUNNING", "SUCCEEDED"), True), Watched("j", ("RUNNING", "QUEUED"), False)),
    release_items={"r1": frozenset({1, 2, 3}), "r2": frozenset({1, 2, 9})},
)


def broken(history: History) -> set[int]:
    return {found.promise for found in check(history).violations}


def with_changes(*changes: Change, state: str = "SUCCEEDED") -> History:
    return replace(GOOD, changes=changes, jobs=(replace(GOOD.jobs[0], state=state),))


def test_a_history_that_keeps_every_promise_passes() -> None:
    verdict = check(GOOD)
    assert verdict.passed and verdict.jobs == 1 and verdict.acknowledged == 2 and verdict.answers == 2


def test_a_best_effort_job_without_its_slow_stage_passes() -> None:
    gave_up = replace(DONE, reason="DEADLINE_EXCEEDED", actor="dispatcher")
    assert check(replace(GOOD, changes=(*GOOD.changes[:-1], gave_up))).passed


def test_a_job_that_was_cancelled_while_it_ran_passes() -> None:
    asked = Change("j", "RUNNING", "CANCELLING", "lookup", "client", 1, "cancel requested")
    stopped = Change("j", "CANCELLING", "CANCELLED", "lookup", "w1", 1, "cancelled")
    history = with_changes(CREATED, CLAIMED, asked, stopped, state="CANCELLED")
    shown = Watched("j", ("RUNNING", "CANCELLING", "CANCELLED"), True)
    assert check(replace(history, results=(), reads=(), watched=(shown,))).passed


def watched(*states: str, ended: bool = True) -> History:
    return replace(GOOD, watched=(Watched("j", states, ended),))


LIVE = with_changes(CREATED, CLAIMED, EXPIRED, state="QUEUED")
TWO_ANSWERS = (replace(GOOD.reads[0], items=(1, 2)), replace(GOOD.reads[1], items=(2, 1)))
BREAKING = {
    "an acknowledged job that is gone": (1, replace(GOOD, jobs=(), changes=(), results=(), reads=())),
    "an acknowledged job that never ends": (1, replace(LIVE, results=(), reads=(), faults=())),
    "one request acknowledged as two jobs": (
        1, replace(GOOD, acknowledged=(*GOOD.acknowledged, Acknowledged("q", "p", "k", 3.0)))),
    "an acknowledgement that names another request's job": (
        1, replace(GOOD, acknowledged=(Acknowledged("other", "p", "j", 1.0),))),
    "a job that ends twice": (2, with_changes(*GOOD.changes, replace(DONE, before="SUCCEEDED", after="FAILED"))),
    "a job whose row is not what its changes say": (2, replace(GOOD, jobs=(replace(GOOD.jobs[0], state="FAILED"),))),
    "a job that leaps over a state": (2, with_changes(CREATED, replace(DONE, stage="lookup", fence=0))),
    "a change from a state the job was not in": (2, with_changes(CREATED, CLAIMED, AGAIN, *GOOD.changes[4:])),
    "a job that was never created": (2, with_changes(CLAIMED)),
    "a watch that shows states in another order": (2, watched("RUNNING", "SUCCEEDED", "QUEUED", ended=False)),
    "a watch that shows a state the job was never in": (2, watched("QUEUED", "CANCELLING", "SUCCEEDED")),
    "a watch that shows two ends": (2, watched("RUNNING", "SUCCEEDED", "SUCCEEDED")),
    "a watch that ends before its job": (2, watched("QUEUED", "RUNNING")),
    "a watch that shows nothing and ends": (2, watched()),
    "a watch that shows another answer than was read": (
        3, replace(GOOD, reads=(*GOOD.reads, replace(GOOD.reads[1], items=(2, 1), how="watch")))),
    "two jobs of one request": (
        3, replace(GOOD, jobs=(*GOOD.jobs, replace(GOOD.jobs[0], job="k")))),
    "a stage that completed twice": (
        3, with_changes(*GOOD.changes[:5], replace(AGAIN, fence=3), replace(LOOKED_UP, fence=3),
                        replace(VERIFYING, fence=4), replace(DONE, fence=4))),
    "a result written twice": (3, replace(GOOD, results=(ANSWER, ANSWER, VERIFIED))),
    "a result that no completion wrote": (3, with_changes(CREATED, CLAIMED, EXPIRED, state="QUEUED")),
    "a success without its slow stage's result": (3, replace(GOOD, results=(ANSWER,))),
    "an answer that changes between two readings": (3, replace(GOOD, reads=TWO_ANSWERS)),
    "a worker that completes after it lost its lease": (
        4, with_changes(*GOOD.changes[:4], replace(LOOKED_UP, actor="w1", fence=1), *GOOD.changes[5:])),
    "a worker that completes under another one's fence": (
        4, with_changes(*GOOD.changes[:4], replace(LOOKED_UP, actor="w1"), *GOOD.changes[5:])),
    "a worker that changes a job nobody holds": (
        4, with_changes(CREATED, CLAIMED, EXPIRED, replace(AGAIN, after="CANCELLED"), state="CANCELLED")),
    "a fence that was given twice": (4, with_changes(*GOOD.changes[:3], replace(AGAIN, fence=1), *GOOD.changes[4:])),
    "a result of another claim than its completion": (4, replace(GOOD, results=(replace(ANSWER, fence=1), VERIFIED))),
    "a doorbell that Redis lost for ever": (5, replace(LIVE, results=(), reads=())),
    "stages of two releases": (6, replace(GOOD, results=(ANSWER, replace(VERIFIED, names_release="r2")))),
    "a result that names no release": (6, replace(GOOD, results=(replace(ANSWER, release=None), VERIFIED))),
    "a result with another release's item": (6, replace(GOOD, results=(replace(ANSWER, items=(1, 9)), VERIFIED))),
    "an answer with another release's item": (6, replace(GOOD, reads=(replace(GOOD.reads[0], items=(1, 9)),))),
    "answers of two releases": (6, replace(GOOD, reads=(GOOD.reads[0], replace(GOOD.reads[1], release="r2")))),
    "a withdrawn item in a later answer": (7, replace(GOOD, reads=(replace(GOOD.reads[0], began=5.1, ended=5.2),))),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKING)
def test_a_history_that_breaks_a_promise_is_caught(name: str) -> None:
    promise, history = BREAKING[name]
    assert promise in broken(history), check(history).violations


def test_every_promise_is_broken_by_one_of_the_histories() -> None:
    assert {promise for promise, _ in BREAKING.values()} == set(range(1, 8))


def test_an_answer_under_way_when_its_item_was_withdrawn_breaks_nothing() -> None:
    assert check(replace(GOOD, reads=(Read("j", "RETRIEVED", "r1", (1, 2, 3), 4.9, 5.4),))).passed


def test_a_history_is_the_same_after_it_was_kept(tmp_path: Path) -> None:
    GOOD.write(tmp_path / "history.jsonl.gz")
    assert History.read(tmp_path / "history.jsonl.gz") == GOOD
    GOOD.write(tmp_path / "again.jsonl.gz")
    assert (tmp_path / "history.jsonl.gz").read_bytes() == (tmp_path / "again.jsonl.gz").read_bytes()
