"""Stage ``verify`` on a real database with the exact teacher on a tiny model."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from byline.jobs import Claim, Job, NewJob, Stage, State, Tier
from byline.jobs.runner import Beat, Outcome, RunOutcome
from services.workers.answer import retrieved_answer, retrieved_influence
from services.workers.verification import VerifyStage

from .conftest import Bench, png

DRAWS = 16


#: So many that a candidate fills a call of the UNet: a stage can be interrupted between candidates.
MANY_DRAWS = 128


def make_stage(bench: Bench, draws: int = DRAWS, racing: bool = False) -> VerifyStage:
    return VerifyStage(
        store=bench.jobs,
        bench=bench.teachers,
        blobs=bench.blobs,
        withdrawn=bench.withdrawn,
        teacher="abu_plus",
        draws=draws,
        clock=time.perf_counter,
        racing=racing,
    )


@pytest.fixture
def verify(bench: Bench) -> VerifyStage:
    return make_stage(bench)


@pytest.fixture
def long(bench: Bench) -> VerifyStage:
    return make_stage(bench, MANY_DRAWS)


def retrieved_job(
    bench: Bench, *, top_k: int = 2, candidates: int = 5, release: str = "r1", revision: str | None = None,
    groups: Sequence[int] | None = None,
) -> Job:  # fmt: skip
    """A VERIFIED job whose lookup is done: its next stage waits for the teacher. With ``groups`` of the items copies
    are listed together."""
    job, _ = bench.jobs.create(
        NewJob(
            project_id="p",
            request_id=uuid.uuid4().hex,
            model_id="tiny",
            prompt="a red cat",
            image_sha256=bench.blobs.put(png(100)),
            tier=Tier.VERIFIED,
            top_k=top_k,
            candidates=candidates,
        )
    )
    items = bench.items
    if groups is not None:
        items = [replace(one, near_duplicate_group=group) for one, group in zip(items, groups, strict=True)]
    influences = [
        retrieved_influence(item, rank=rank, cosine=1 - rank / 10, probability=None)
        for rank, item in enumerate(items, start=1)
    ]
    answer = retrieved_answer(
        influences,
        top_k=top_k,
        release_id=release,
        model_revision=revision or bench.teachers.model_revision,
        not_attributable=False,
        noise_floor=None,
        timings_ms={},
        apart=groups is None,
    )

    def lookup(_claim: Claim, _beat: Beat) -> Outcome:
        return Outcome(answer)

    assert bench.runner("lookup").run(job.id, Stage.LOOKUP, lookup, release) is RunOutcome.COMPLETED
    return job


def verified(bench: Bench, job: Job) -> dict[str, Any]:
    return dict(bench.jobs.results(job.id)[Stage.VERIFY].result)


def test_the_candidates_are_scored_and_ranked_by_tau(bench: Bench, verify: VerifyStage) -> None:
    job = retrieved_job(bench)
    assert bench.runner().run(job.id, Stage.VERIFY, verify) is RunOutcome.COMPLETED
    answer = verified(bench, job)
    every = answer["influences"] + answer["candidates"]
    assert (answer["tier"], answer["release_id"], answer["draws"]) == ("VERIFIED", "r1", DRAWS)
    assert answer["model_revision"] == bench.teachers.model_revision
    assert {one["item_id"] for one in every} == {str(item.item_id) for item in bench.items[:5]}
    taus = [one["tau"] for one in every]
    assert taus == sorted(taus, reverse=True)
    assert [one["rank"] for one in every] == [1, 2, 3, 4, 5]
    assert all(one["standard_error"] > 0 for one in every)
    assert all(bench.items[one["retrieved_rank"] - 1].item_id == int(one["item_id"]) for one in every)
    assert bench.jobs.find(job.id).state is State.SUCCEEDED  # type: ignore[union-attr]


def test_running_again_gives_the_same_tau(bench: Bench, verify: VerifyStage) -> None:
    answers = []
    for _ in range(2):
        job = retrieved_job(bench)
        bench.runner().run(job.id, Stage.VERIFY, verify)
        answers.append({one["item_id"]: one["tau"] for one in verified(bench, job)["influences"]})
    assert answers[0] == answers[1]


def test_an_item_withdrawn_after_the_lookup_is_neither_scored_nor_shown(bench: Bench, verify: VerifyStage) -> None:
    job = retrieved_job(bench)
    gone = bench.items[0].item_id
    bench.catalog.withdraw([gone])
    bench.runner().run(job.id, Stage.VERIFY, verify)
    answer = verified(bench, job)
    assert str(gone) not in {one["item_id"] for one in answer["influences"] + answer["candidates"]}
    assert len(answer["influences"]) == 2


def test_an_item_withdrawn_while_the_teacher_works_keeps_the_answer_from_being_written(
    bench: Bench, verify: VerifyStage
) -> None:
    job = retrieved_job(bench)
    gone = bench.items[1].item_id

    def withdraw_at_the_end(claim: Claim, beat: Beat) -> Outcome:
        outcome = verify(claim, beat)
        bench.catalog.withdraw([gone])
        return outcome

    assert bench.runner().run(job.id, Stage.VERIFY, withdraw_at_the_end) is RunOutcome.RETRIED
    assert Stage.VERIFY not in bench.jobs.results(job.id)
    assert bench.jobs.find(job.id).error["reason"] == "ITEM_WITHDRAWN"  # type: ignore[union-attr,index]


def _interrupted(verify: VerifyStage, then: Callable[[], None]) -> Callable[[Claim, Beat], Outcome]:
    """The stage, with ``then`` called once the teacher has scored its first candidate."""

    class Interrupting(Beat):
        def __init__(self, beat: Beat) -> None:
            self._beat = beat

        def progress(self, done: int, total: int) -> None:
            if done == 1:
                then()
                self._beat.wake.set()
            self._beat.progress(done, total)

        def check(self) -> None:
            self._beat.check()

    return lambda claim, beat: verify(claim, Interrupting(beat))


def test_a_worker_asked_to_stop_gives_the_job_back_without_costing_an_attempt(
    bench: Bench, long: VerifyStage
) -> None:
    job = retrieved_job(bench)
    assert bench.runner().run(job.id, Stage.VERIFY, _interrupted(long, bench.stop.set)) is RunOutcome.RELEASED
    waiting = bench.jobs.find(job.id)
    assert waiting is not None
    assert (waiting.state, waiting.stage, waiting.attempt) == (State.QUEUED, Stage.VERIFY, 0)
    bench.stop.clear()
    assert bench.runner().run(job.id, Stage.VERIFY, long) is RunOutcome.COMPLETED


def test_a_cancelled_job_stops_between_candidates_and_keeps_no_verified_answer(
    bench: Bench, long: VerifyStage
) -> None:
    job = retrieved_job(bench)

    def cancel() -> None:
        bench.jobs.cancel("p", job.id)

    assert bench.runner().run(job.id, Stage.VERIFY, _interrupted(long, cancel)) is RunOutcome.CANCELLED
    assert Stage.VERIFY not in bench.jobs.results(job.id)
    assert bench.jobs.find(job.id).state is State.CANCELLED  # type: ignore[union-attr]


def test_an_answer_retrieved_from_another_revision_is_not_verified(bench: Bench, verify: VerifyStage) -> None:
    job = retrieved_job(bench, revision="an-older-one")
    assert bench.runner().run(job.id, Stage.VERIFY, verify) is RunOutcome.FAILED
    assert bench.jobs.find(job.id).error["reason"] == "MODEL_MISMATCH"  # type: ignore[union-attr,index]
    assert Stage.VERIFY not in bench.jobs.results(job.id)


def test_racing_gives_the_same_tau_to_whom_it_keeps_and_scores_everybody(bench: Bench, verify: VerifyStage) -> None:
    answers = []
    for stage in (verify, make_stage(bench, racing=True)):
        job = retrieved_job(bench)
        assert bench.runner().run(job.id, Stage.VERIFY, stage) is RunOutcome.COMPLETED
        answers.append(verified(bench, job))
    plain, raced = answers
    assert {one["item_id"] for one in raced["influences"] + raced["candidates"]} == {
        one["item_id"] for one in plain["influences"] + plain["candidates"]
    }
    by_id = {one["item_id"]: one for one in plain["influences"] + plain["candidates"]}
    kept = [one for one in raced["influences"] if one["standard_error"] == by_id[one["item_id"]]["standard_error"]]
    assert kept and all(one["tau"] == by_id[one["item_id"]]["tau"] for one in kept)
    assert raced["teacher_id"] != plain["teacher_id"]


def test_a_race_for_all_candidates_is_none(bench: Bench) -> None:
    job = retrieved_job(bench, top_k=5, candidates=5)
    bench.runner().run(job.id, Stage.VERIFY, make_stage(bench, racing=True))
    assert verified(bench, job)["teacher_id"] == bench.teachers.teacher("abu_plus", DRAWS).teacher_id


#: The first three items are one picture.
COPIED = (1, 1, 1, 4, 5, 6)


def test_copies_neither_take_candidates_from_others_nor_are_scored(bench: Bench, verify: VerifyStage) -> None:
    job = retrieved_job(bench, top_k=2, candidates=3, groups=COPIED)
    assert bench.runner().run(job.id, Stage.VERIFY, verify) is RunOutcome.COMPLETED
    answer = verified(bench, job)
    every = answer["influences"] + answer["candidates"]
    assert {one["item_id"] for one in every if one["tau"] is not None} == {"1", "4", "5"}
    assert {one["item_id"] for one in every if one["tau"] is None} == {"2", "3"}
    assert {one["rank"] for one in answer["influences"]} == {1, 2}, "top_k counts groups"


def test_a_race_gives_each_group_that_is_shown_all_its_draws(bench: Bench, verify: VerifyStage) -> None:
    answers = []
    for stage in (verify, make_stage(bench, racing=True)):
        job = retrieved_job(bench, top_k=2, candidates=4, groups=COPIED)
        assert bench.runner().run(job.id, Stage.VERIFY, stage) is RunOutcome.COMPLETED
        answers.append(verified(bench, job))
    plain, raced = answers
    assert plain["teacher_id"] != raced["teacher_id"]
    shown = [one for one in raced["influences"] if one["tau"] is not None]
    assert len({one["near_duplicate_group"] for one in shown}) == 2
    by_id = {one["item_id"]: one for one in plain["influences"] + plain["candidates"]}
    assert all(one["standard_error"] == by_id[one["item_id"]]["standard_error"] for one in shown)
