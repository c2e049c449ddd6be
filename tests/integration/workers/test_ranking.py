"""Stage ``rank``: a label exists exactly when its job succeeded."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any

import pytest
from sqlalchemy import text

from byline.db import transaction
from byline.errors import BylineError
from byline.jobs import Claim, Job, NewJob, Stage, State
from byline.jobs.runner import Beat, Outcome, RunOutcome
from byline.jobs.states import Kind
from byline.rankings.store import RankingStore
from services.workers.ranking import RankStage

from .conftest import Bench, png


@pytest.fixture
def rank(bench: Bench) -> RankStage:
    return RankStage(
        rankings=RankingStore(bench.engine),
        catalog=bench.catalog,
        bench=bench.teachers,
        blobs=bench.blobs,
        corpus_id="tiny",
        withdrawn=bench.withdrawn,
        teacher="abu_plus",
        draws=16,
        clock=time.perf_counter,
    )


def add_query(bench: Bench) -> uuid.UUID:
    with transaction(bench.engine) as connection:
        return RankingStore(bench.engine).add_query(
            connection,
            model_id="tiny",
            prompt="a red cat",
            seed=1,
            split="train",
            near_duplicate_group=1,
            image_sha256=bench.blobs.put(png(200)),
            source="corpus",
        )


def rank_job(bench: Bench, payload: Mapping[str, Any]) -> Job:
    job, _ = bench.jobs.create(
        NewJob(
            project_id="curation",
            request_id=uuid.uuid4().hex,
            model_id="tiny",
            prompt="a red cat",
            kind=Kind.RANKING,
            payload=payload,
        )
    )
    return job


def test_the_ranking_is_written_with_the_completion(bench: Bench, rank: RankStage) -> None:
    query_id = add_query(bench)
    wanted = [5, 2, 4]
    job = rank_job(bench, {"query_id": str(query_id), "candidate_ids": wanted})
    assert bench.runner().run(job.id, Stage.RANK, rank) is RunOutcome.COMPLETED
    result = bench.jobs.results(job.id)[Stage.RANK].result
    (label,) = RankingStore(bench.engine).load("tiny", result["teacher_id"])
    assert label.item_ids.tolist() == wanted
    assert label.query_id == query_id
    assert label.tau_halves is not None and label.tau_halves.shape == (2, 3)
    assert (result["n"], result["draws"]) == (3, 16)


def test_the_same_label_asked_for_twice_is_kept_once_and_both_jobs_succeed(bench: Bench, rank: RankStage) -> None:
    query_id = add_query(bench)
    payload = {"query_id": str(query_id), "candidate_ids": [1, 2]}
    jobs = [rank_job(bench, payload) for _ in range(2)]
    assert [bench.runner().run(job.id, Stage.RANK, rank) for job in jobs] == [RunOutcome.COMPLETED] * 2
    teacher_id = bench.jobs.results(jobs[0].id)[Stage.RANK].result["teacher_id"]
    assert len(RankingStore(bench.engine).load("tiny", teacher_id)) == 1


def test_a_completion_that_fails_leaves_no_label(bench: Bench, rank: RankStage) -> None:
    query_id = add_query(bench)
    job = rank_job(bench, {"query_id": str(query_id), "candidate_ids": [1, 2]})

    def fails_after_writing(claim: Claim, beat: Beat) -> Outcome:
        outcome = rank(claim, beat)

        def also(connection: Any) -> None:
            assert outcome.also is not None
            outcome.also(connection)
            raise BylineError("the commit failed")

        return Outcome(outcome.result, also)

    assert bench.runner().run(job.id, Stage.RANK, fails_after_writing) is RunOutcome.RETRIED
    assert RankingStore(bench.engine).teachers("tiny") == {}


def test_the_whole_corpus_means_every_item_that_is_not_withdrawn(bench: Bench, rank: RankStage) -> None:
    bench.catalog.withdraw([3])
    job = rank_job(bench, {"query_id": str(add_query(bench)), "candidate_set": "corpus"})
    bench.runner().run(job.id, Stage.RANK, rank)
    result = bench.jobs.results(job.id)[Stage.RANK].result
    (label,) = RankingStore(bench.engine).load("tiny", result["teacher_id"])
    assert label.item_ids.tolist() == [1, 2, 4, 5, 6]
    assert label.candidate_set == "corpus"


def test_an_unknown_query_fails_at_once(bench: Bench, rank: RankStage) -> None:
    job = rank_job(bench, {"query_id": str(uuid.uuid4()), "candidate_ids": [1]})
    assert bench.runner().run(job.id, Stage.RANK, rank) is RunOutcome.FAILED
    assert bench.jobs.find(job.id).state is State.FAILED  # type: ignore[union-attr]


def test_a_worker_with_another_revision_of_the_model_makes_no_label(bench: Bench, rank: RankStage) -> None:
    job = rank_job(bench, {"query_id": str(add_query(bench)), "candidate_ids": [1, 2]})
    with transaction(bench.engine) as connection:
        connection.execute(text("UPDATE models SET revision = 'another'"))
    assert bench.runner().run(job.id, Stage.RANK, rank) is RunOutcome.FAILED
    assert bench.jobs.find(job.id).error["reason"] == "MODEL_MISMATCH"  # type: ignore[union-attr,index]
    assert RankingStore(bench.engine).teachers("tiny") == {}
