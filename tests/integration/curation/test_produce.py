"""Queries become ranking jobs, again if need be: real Postgres, pictures and candidates made by arithmetic."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import Engine, update

from byline.catalog.blobs import BlobStore
from byline.catalog.items import Item
from byline.catalog.store import CatalogStore, ModelRecord
from byline.db.models import Base
from byline.db.session import make_engine, transaction
from byline.jobs.store import JobStore
from byline.rankings.store import RankingStore
from services.curation.plan import PlannedQuery
from services.curation.produce import MOST_ATTEMPTS, Labelling, Producer
from services.curation.shortlist import Shortlist
from services.curation.wiring import live_plan

PLANNED = PlannedQuery("a red kite", 7, 3, "train")
KEY = (PLANNED.prompt, PLANNED.seed)
JOBS = Base.metadata.tables["jobs"]
QUERIES = Base.metadata.tables["queries"]


@dataclass(frozen=True)
class Labels:
    """A Ranking as a teacher gives it."""

    item_ids: np.ndarray
    tau: np.ndarray
    standard_error: np.ndarray
    tau_halves: np.ndarray | None = None
    samples: np.ndarray | None = None
    draws: int = 16
    teacher_id: str = "abu_plus_linear/1"
    candidate_set: str = "nearest-4"


@pytest.fixture
def engine(database_url: str, tmp_path: Path) -> Iterator[Engine]:
    engine = make_engine(database_url)
    catalog = CatalogStore(engine)
    catalog.add_corpus("toy")
    catalog.add_model(ModelRecord("toy", "toy", tmp_path / "model", "rev1"))
    yield engine
    engine.dispose()


@pytest.fixture
def producer(engine: Engine, tmp_path: Path) -> Producer:
    return Producer(
        engine, JobStore(engine, {}), RankingStore(engine), BlobStore(tmp_path / "blobs"), "toy",
        Labelling("abu_plus_linear", 16, {}), lambda planned: planned.prompt.encode(),
        lambda planned, picture: Shortlist(np.arange(4, dtype=np.int64)),
    )  # fmt: skip


def _end(engine: Engine, job_id: uuid.UUID, state: str = "FAILED") -> None:
    with transaction(engine) as connection:
        connection.execute(update(JOBS).where(JOBS.c.id == job_id).values(state=state))


def _rank(engine: Engine, job_id: uuid.UUID) -> None:
    with transaction(engine) as connection:
        query = connection.execute(QUERIES.select()).mappings().one()
        ones = np.ones(4, np.float32)
        RankingStore(engine).add_ranking(connection, query["id"], Labels(np.arange(4), ones, ones), job_id)


def test_a_query_with_an_unfinished_job_is_known_and_has_one_job(producer: Producer) -> None:
    assert producer.known() == frozenset()
    job = producer.produce([PLANNED])
    assert producer.known() == {KEY}
    assert producer.produce([PLANNED]) == job


@pytest.mark.parametrize("state", ["FAILED", "CANCELLED"])
def test_a_query_whose_job_ended_without_a_ranking_gets_another_job(
    producer: Producer, engine: Engine, state: str
) -> None:
    first = producer.produce([PLANNED])
    _end(engine, first, state)
    assert producer.known() == frozenset()
    second = producer.produce([PLANNED])
    assert second != first and producer.known() == {KEY}


def test_a_ranked_query_is_known_when_its_job_has_ended(producer: Producer, engine: Engine) -> None:
    job = producer.produce([PLANNED])
    _rank(engine, job)
    _end(engine, job, "SUCCEEDED")
    assert producer.known() == {KEY}


def test_a_query_that_always_fails_is_left_alone_in_the_end(producer: Producer, engine: Engine) -> None:
    jobs = set()
    for _ in range(MOST_ATTEMPTS):
        assert producer.known() == frozenset()
        jobs.add(job := producer.produce([PLANNED]))
        _end(engine, job)
    assert len(jobs) == MOST_ATTEMPTS and producer.known() == {KEY}


BATCH = [PlannedQuery(f"kite {number}", number, number, "train") for number in range(3)]


def test_a_batch_is_one_job_that_names_all_its_queries(producer: Producer, engine: Engine) -> None:
    job = producer.store.find(producer.produce(BATCH))
    assert job is not None and producer.known() == {(planned.prompt, planned.seed) for planned in BATCH}
    with transaction(engine) as connection:
        prompts = dict(connection.execute(QUERIES.select().with_only_columns(QUERIES.c.id, QUERIES.c.prompt)).all())
    assert [prompts[uuid.UUID(query)] for query in job.payload["query_ids"]] == ["kite 0", "kite 1", "kite 2"]
    # One list for all, since they are equal here.
    assert job.payload["candidate_ids"] == ["0", "1", "2", "3"]


def test_queries_with_different_candidates_keep_their_own(producer: Producer) -> None:
    own = replace(producer, candidates=lambda planned, picture: Shortlist(np.arange(planned.seed, planned.seed + 2)))
    job = producer.store.find(own.produce(BATCH))
    assert job is not None and job.payload["candidate_ids_by_query"] == [["0", "1"], ["1", "2"], ["2", "3"]]
    assert job.payload["candidate_set"] == "nearest-2" and "candidate_ids" not in job.payload


def test_the_whole_corpus_is_asked_for_without_a_list(producer: Producer) -> None:
    job = producer.store.find(replace(producer, candidates=None).produce(BATCH))
    assert job is not None and not {"candidate_ids", "candidate_ids_by_query", "candidate_set"} & set(job.payload)


def test_a_service_that_is_to_end_enqueues_what_it_has_generated(producer: Producer) -> None:
    stopping = iter([False, True])
    job = producer.store.find(replace(producer, stopping=lambda: next(stopping)).produce(BATCH))
    assert job is not None and len(job.payload["query_ids"]) == 2


def test_no_query_is_in_two_open_jobs(producer: Producer) -> None:
    first = producer.produce(BATCH[:2])
    second = producer.store.find(producer.produce(BATCH[1:]))
    assert second is not None and second.id != first and len(second.payload["query_ids"]) == 1
    assert producer.produce(BATCH[:2]) == first


def test_each_query_of_a_failed_batch_has_an_attempt_less_and_is_told_apart(
    producer: Producer, engine: Engine
) -> None:
    keys = {(planned.prompt, planned.seed) for planned in BATCH}
    for attempt in range(MOST_ATTEMPTS):
        assert (producer.known(), producer.failed()) == (frozenset(), keys if attempt else frozenset())
        _end(engine, producer.produce(BATCH))
    assert producer.known() == producer.failed() == keys
    other = replace(producer, labelling=Labelling("abu_plus", 16, {}))
    assert other.known() == frozenset()


def test_the_store_tells_in_which_splits_a_prompt_is(producer: Producer, engine: Engine) -> None:
    producer.produce([PLANNED])
    producer.produce([PlannedQuery(PLANNED.prompt, 8, 2, "test")])
    producer.produce([PlannedQuery("a blue kite", 9, 4, "validation")])
    splits = RankingStore(engine).splits_of_prompts("toy")
    assert splits == {PLANNED.prompt: {"train", "test"}, "a blue kite": {"validation"}}
    assert RankingStore(engine).splits_of_prompts("other") == {}


def test_a_stored_test_caption_stays_a_test_caption_whatever_items_come_and_go(
    producer: Producer, engine: Engine
) -> None:
    catalog = CatalogStore(engine)
    catalog.add_items("toy", [Item(n, f"kite {n}", image_sha256=f"{n:064x}") for n in range(1000, 1030)])
    rankings = RankingStore(engine)

    def splits() -> dict[str, str]:
        planned = itertools.islice(live_plan(catalog, rankings, "toy", "toy", 0), 120)
        return {p.prompt: p.split for p in planned}

    before = splits()
    for planned in list(itertools.islice(live_plan(catalog, rankings, "toy", "toy", 0), 30)):
        producer.produce([planned])
    # Items with smaller ids rename every group; then the ones that held the names, and one caption, go.
    catalog.add_items("toy", [Item(n, f"kite {1000 + n}", image_sha256=f"{n:064x}") for n in range(1, 30)])
    assert splits() == before
    catalog.withdraw([*range(1, 30), 1000])
    assert splits() == {prompt: split for prompt, split in before.items() if prompt != "kite 1000"}


def test_captions_tied_by_a_withdrawn_item_stay_in_one_split(engine: Engine) -> None:
    catalog = CatalogStore(engine)
    items = [Item(n, f"kite {n}", image_sha256=f"{n:064x}") for n in range(20)]
    ties = [Item(100 + n, f"kite {n}", image_sha256=f"{100 + n:064x}", near_duplicate_group=n + 10) for n in range(10)]
    catalog.add_items("toy", [*items, *ties])
    catalog.withdraw([tie.item_id for tie in ties])
    planned = itertools.islice(live_plan(catalog, RankingStore(engine), "toy", "toy", 0), 100)
    splits = {p.prompt: p.split for p in planned}
    assert len(splits) == 20
    assert all(splits[f"kite {n}"] == splits[f"kite {n + 10}"] for n in range(10))
