"""Stage ``rank``: a label exists exactly when its job succeeded."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import text

from byline.db import transaction
from byline.errors import BylineError
from byline.jobs import Claim, Job, NewJob, Stage, State
from byline.jobs.runner import Beat, Outcome, RunOutcome
from byline.jobs.states import Kind
from byline.rankings.store import LabelledQuery, RankingStore
from byline.teachers import Ranking
from byline.teachers.first_order import AbuPlusLinear
from byline.teachers.item_gradients import ItemGradients
from byline.teachers.item_losses import ItemLosses
from services.workers.kept_rankings import KeptRankings
from services.workers.ranking import RankStage
from services.workers.scratch import Scratch

from .conftest import Bench, png


@pytest.fixture
def rank(bench: Bench, tmp_path: Path) -> RankStage:
    return make_rank(bench, tmp_path)


def make_rank(bench: Bench, tmp_path: Path, **more: Any) -> RankStage:
    return RankStage(
        rankings=RankingStore(bench.engine),
        catalog=bench.catalog,
        bench=bench.teachers,
        blobs=bench.blobs,
        scratch=Scratch(tmp_path / "scratch"),
        corpus_id="tiny",
        withdrawn=bench.withdrawn,
        teacher="abu_plus",
        draws=16,
        **({"clock": time.perf_counter} | more),
    )


def add_query(bench: Bench, seed: int = 1) -> uuid.UUID:
    with transaction(bench.engine) as connection:
        return RankingStore(bench.engine).add_query(
            connection,
            model_id="tiny",
            prompt="a red cat",
            seed=seed,
            split="train",
            near_duplicate_group=1,
            image_sha256=bench.blobs.put(png(199 + seed)),
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
    assert (result["n"], result["draws"]) == ([3], 16)


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


def linear(bench: Bench, **payload: Any) -> Job:
    return rank_job(bench, {"teacher": "abu_plus_linear", **payload})


def labels(bench: Bench, job: Job) -> dict[uuid.UUID, LabelledQuery]:
    teacher_id = bench.jobs.results(job.id)[Stage.RANK].result["teacher_id"]
    found = {label.query_id: label for label in RankingStore(bench.engine).load("tiny", teacher_id)}
    with transaction(bench.engine) as connection:
        connection.execute(text("DELETE FROM rankings"))
    return found


def at(done: int, then: Callable[[Claim, Beat], None], stage: RankStage) -> Callable[[Claim, Beat], Outcome]:
    """The stage, with ``then`` called when it reports ``done`` items."""

    def work(claim: Claim, beat: Beat) -> Outcome:
        progress = beat.progress

        def reported(finished: int, total: int) -> None:
            progress(finished, total)
            if finished == done:
                then(claim, beat)

        beat.progress = reported  # type: ignore[method-assign]
        return stage(claim, beat)

    return work


def same(one: LabelledQuery, other: LabelledQuery) -> None:
    np.testing.assert_array_equal(one.item_ids, other.item_ids)
    for name in ("tau", "standard_error", "tau_halves"):
        first, second = getattr(one, name), getattr(other, name)
        np.testing.assert_allclose(first, second, rtol=1e-3, atol=1e-4 * np.abs(first).max())
    assert (one.candidate_set, one.draws) == (other.candidate_set, other.draws)


def test_a_batch_gives_every_query_the_ranking_it_would_have_had_alone(bench: Bench, rank: RankStage) -> None:
    queries = [add_query(bench, seed) for seed in (1, 2, 3)]
    wanted = [[5, 2, 4], [1, 2], [6, 5, 4, 3]]
    batch = linear(bench, query_ids=[str(q) for q in queries], candidate_ids_by_query=wanted, candidate_set="mine")
    assert bench.runner().run(batch.id, Stage.RANK, rank) is RunOutcome.COMPLETED
    assert bench.jobs.results(batch.id)[Stage.RANK].result["scored"] == 6
    together = labels(bench, batch)
    for query, ids in zip(queries, wanted, strict=True):
        single = linear(bench, query_id=str(query), candidate_ids=ids, candidate_set="mine")
        bench.runner().run(single.id, Stage.RANK, rank)
        alone = labels(bench, single)[query]
        assert together[query].item_ids.tolist() == ids
        same(together[query], alone)


@pytest.fixture
def chunks_of_two(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes the first-order teacher keep every two items; the list gets the items of each chunk it computes."""
    computed: list[int] = []
    block = ItemGradients.block

    def counted(self: ItemGradients, items: Any, *arguments: Any, **more: Any) -> Any:
        found = block(self, items, *arguments, **more)
        computed.extend(item.item_id for item in items if item.item_id > 0)  # not the queries'
        return found

    monkeypatch.setattr(ItemGradients, "block", counted)
    monkeypatch.setattr(AbuPlusLinear, "chunk_for", lambda self, size: 2)
    return computed


def test_a_killed_batch_goes_on_behind_its_finished_chunks_to_the_same_bits(
    bench: Bench, rank: RankStage, chunks_of_two: list[int], tmp_path: Path
) -> None:
    payload = {"query_ids": [str(add_query(bench, seed)) for seed in (1, 2)], "candidate_set": "corpus"}
    whole = linear(bench, **payload)
    bench.runner().run(whole.id, Stage.RANK, rank)
    expected = labels(bench, whole)
    assert list((tmp_path / "scratch").iterdir()) == [], "a job that is done keeps nothing"
    chunks_of_two.clear()

    job = linear(bench, **payload)
    stop = at(4, lambda claim, beat: bench.stop.set(), rank)
    assert bench.runner().run(job.id, Stage.RANK, stop) is RunOutcome.RELEASED
    assert chunks_of_two == [1, 2, 3, 4]
    bench.stop.clear()
    assert bench.runner("w2").run(job.id, Stage.RANK, rank) is RunOutcome.COMPLETED
    assert chunks_of_two == [1, 2, 3, 4, 5, 6]
    found = labels(bench, job)
    for query, label in expected.items():
        np.testing.assert_array_equal(found[query].tau, label.tau)
        np.testing.assert_array_equal(found[query].standard_error, label.standard_error)


def test_a_cancelled_batch_stops_at_its_next_check_and_labels_nothing(
    bench: Bench, rank: RankStage, chunks_of_two: list[int]
) -> None:
    job = linear(bench, query_ids=[str(add_query(bench))], candidate_set="corpus")

    def cancel(claim: Claim, beat: Beat) -> None:
        bench.jobs.cancel("curation", job.id)
        beat.cancelled = bench.jobs.heartbeat(claim, 2, 6, 30.0)

    assert bench.runner().run(job.id, Stage.RANK, at(2, cancel, rank)) is RunOutcome.CANCELLED
    assert chunks_of_two == [1, 2]
    assert RankingStore(bench.engine).teachers("tiny") == {}


def test_what_an_attempt_kept_is_not_taken_for_the_scores_of_other_items(
    bench: Bench, rank: RankStage, chunks_of_two: list[int]
) -> None:
    job = linear(bench, query_ids=[str(add_query(bench))], candidate_set="corpus")

    bench.runner().run(job.id, Stage.RANK, at(4, lambda claim, beat: bench.stop.set(), rank))
    bench.stop.clear()
    bench.catalog.withdraw([2])
    assert bench.runner().run(job.id, Stage.RANK, rank) is RunOutcome.COMPLETED
    (label,) = labels(bench, job).values()
    assert label.item_ids.tolist() == [1, 3, 4, 5, 6]


def test_a_ranking_gives_way_to_a_client_between_chunks_and_goes_on_behind_them(
    bench: Bench, chunks_of_two: list[int], tmp_path: Path
) -> None:
    waiting = [True]
    seconds = itertools.count(0.0, 5.0)
    rank = make_rank(bench, tmp_path, clock=lambda: next(seconds), clients_wait=lambda: waiting[0])
    job = linear(bench, query_ids=[str(add_query(bench))], candidate_set="corpus")
    assert bench.runner().run(job.id, Stage.RANK, rank) is RunOutcome.RELEASED
    assert chunks_of_two == [1, 2, 3, 4], "the first chunk starts the clock, after the second it gives way"
    given = bench.jobs.find(job.id)
    assert given is not None and (given.state, given.attempt) == (State.QUEUED, 0)
    assert bench.jobs.events(job.id)[-1].reason == "gave way"
    waiting[0] = False
    assert bench.runner().run(job.id, Stage.RANK, rank) is RunOutcome.COMPLETED
    assert chunks_of_two == [1, 2, 3, 4, 5, 6]


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> list[uuid.UUID]:
    """The queries that were scored by a teacher that goes from one to the next."""
    found: list[uuid.UUID] = []
    put = KeptRankings.put

    def noted(self: KeptRankings, query_id: uuid.UUID, ranking: Ranking) -> None:
        put(self, query_id, ranking)
        found.append(query_id)

    monkeypatch.setattr(KeptRankings, "put", noted)
    return found


@pytest.mark.parametrize("teacher", ["abu_plus", "sketch", "similarity:pixels"])
def test_a_ranking_by_any_teacher_gives_way_between_queries_and_scores_none_twice(
    bench: Bench, tmp_path: Path, finished: list[uuid.UUID], teacher: str
) -> None:
    queries = [add_query(bench, seed) for seed in (1, 2, 3, 4)]
    payload = {"query_ids": [str(q) for q in queries], "candidate_ids": [1, 2, 3], "teacher": teacher}
    whole = rank_job(bench, payload)
    assert bench.runner().run(whole.id, Stage.RANK, make_rank(bench, tmp_path)) is RunOutcome.COMPLETED
    expected = labels(bench, whole)
    finished.clear()

    waiting = [True]
    seconds = itertools.count(0.0, 5.0)
    rank = make_rank(bench, tmp_path, clock=lambda: next(seconds), clients_wait=lambda: waiting[0])
    job = rank_job(bench, payload)
    assert bench.runner().run(job.id, Stage.RANK, rank) is RunOutcome.RELEASED
    before = len(finished)
    assert 0 < before < 4 and bench.jobs.events(job.id)[-1].reason == "gave way"
    waiting[0] = False
    assert bench.runner("w2").run(job.id, Stage.RANK, rank) is RunOutcome.COMPLETED
    assert finished == queries, "none is scored again"
    for query, label in labels(bench, job).items():
        np.testing.assert_array_equal(label.tau, expected[query].tau)
        np.testing.assert_array_equal(label.tau_halves, expected[query].tau_halves)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_the_exact_teacher_gives_way_within_a_query_and_measures_no_loss_twice(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    measure = ItemLosses.measure

    def counted(self: ItemLosses, cells: Any, weights: Any, fill: bool = True) -> Any:
        if fill and any(weights):  # not the calibration's, nor baselines
            measured.extend({cell.item.item_id for cell in cells})
        return measure(self, cells, weights, fill)

    monkeypatch.setattr(ItemLosses, "measure", counted)
    waiting = [True]
    seconds = itertools.count(0.0, 5.0)
    rank = make_rank(bench, tmp_path, clock=lambda: next(seconds), clients_wait=lambda: waiting[0])
    # So many draws that each item fills a call of the UNet.
    job = rank_job(bench, {"query_ids": [str(add_query(bench))], "candidate_ids": [1, 2, 3, 4], "draws": 128})
    assert bench.runner().run(job.id, Stage.RANK, rank) is RunOutcome.RELEASED
    assert measured == [1, 2]
    waiting[0] = False
    assert bench.runner().run(job.id, Stage.RANK, rank) is RunOutcome.COMPLETED
    assert measured == [1, 2, 3, 4]


def test_an_item_withdrawn_while_the_ranking_is_made_is_in_no_label(bench: Bench, rank: RankStage) -> None:
    queries = [add_query(bench, seed) for seed in (1, 2)]
    payload = {"query_ids": [str(q) for q in queries], "candidate_ids_by_query": [[1, 2, 3], [2]]}
    whole = rank_job(bench, payload)
    bench.runner().run(whole.id, Stage.RANK, rank)
    expected = labels(bench, whole)[queries[0]]

    def withdraw_at_the_end(claim: Claim, beat: Beat) -> Outcome:
        outcome = rank(claim, beat)
        bench.catalog.withdraw([2])
        return outcome

    job = rank_job(bench, payload)
    assert bench.runner().run(job.id, Stage.RANK, withdraw_at_the_end) is RunOutcome.COMPLETED
    found = labels(bench, job)
    assert set(found) == {queries[0]}, "of the other query nothing is left"
    assert found[queries[0]].item_ids.tolist() == [1, 3]
    np.testing.assert_array_equal(found[queries[0]].tau, expected.tau[[0, 2]])


def test_the_exact_teacher_scores_only_what_each_query_asked_for(bench: Bench, rank: RankStage) -> None:
    queries = [add_query(bench, seed) for seed in (1, 2)]
    job = rank_job(bench, {"query_ids": [str(q) for q in queries], "candidate_ids_by_query": [[5, 2], [1]]})
    assert bench.runner().run(job.id, Stage.RANK, rank) is RunOutcome.COMPLETED
    assert {q: label.item_ids.tolist() for q, label in labels(bench, job).items()} == {
        queries[0]: [5, 2], queries[1]: [1],
    }  # fmt: skip


def test_a_batch_of_which_one_query_is_unknown_labels_none(bench: Bench, rank: RankStage) -> None:
    job = linear(bench, query_ids=[str(add_query(bench)), str(uuid.uuid4())], candidate_ids=[1, 2])
    assert bench.runner().run(job.id, Stage.RANK, rank) is RunOutcome.FAILED
    assert RankingStore(bench.engine).teachers("tiny") == {}


def test_curation_may_label_the_whole_corpus_by_sketches(bench: Bench, rank: RankStage) -> None:
    queries = [add_query(bench, seed) for seed in (1, 2)]
    payload = {"query_ids": [str(q) for q in queries], "teacher": "sketch", "draws": 16, "candidate_set": "corpus"}
    job = rank_job(bench, payload)
    assert bench.runner().run(job.id, Stage.RANK, rank) is RunOutcome.COMPLETED
    found = labels(bench, job)
    assert set(found) == set(queries)
    assert all(label.item_ids.tolist() == [1, 2, 3, 4, 5, 6] for label in found.values())
