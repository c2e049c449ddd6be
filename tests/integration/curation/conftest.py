"""A corpus of arithmetic, clients that ask, workers that rank: what tests of curation share."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Engine, func, select

from byline.catalog.blobs import BlobStore
from byline.catalog.items import Item
from byline.catalog.store import CatalogStore, ModelRecord
from byline.db.models import Base
from byline.db.session import make_engine, transaction
from byline.drift.windows import DriftRule
from byline.evaluation.calibration import Calibrator
from byline.jobs import Stage
from byline.jobs.model import NewJob
from byline.jobs.states import Tier
from byline.jobs.store import JobStore
from byline.rankings.controls import CurationControl
from byline.rankings.store import RankingStore
from services.curation.head import HeadView
from services.curation.intake import Intake
from services.curation.loop import Curator
from services.curation.measuring import Measurer
from services.curation.plan import PlannedQuery
from services.curation.produce import Labelling, Producer
from services.curation.prompts import PromptGroups
from services.curation.shortlist import choose_shortlist

MODEL = "toy"
ITEMS = 60
LINEAR = "abu_plus_linear+output_norm/1"
EXACT = "abu_plus+output_norm/2"
TABLES = Base.metadata.tables
FEATURES = np.random.default_rng(0).standard_normal((ITEMS, 6)).astype(np.float32)
IDS = np.arange(100, 100 + ITEMS)


def letters(prompts: Sequence[str]) -> np.ndarray:
    """Unit rows of how often each letter comes: prompts of nearly the same letters are near."""
    rows = np.array([[prompt.lower().count(chr(97 + n)) for n in range(26)] for prompt in prompts], dtype=np.float32)
    return rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-9)


class PerfectHead:
    """Scores items as the teacher below does, ``flipped`` the other way round."""

    def __init__(self, flipped: bool = False) -> None:
        self.sign = np.float32(-1 if flipped else 1)

    def embed_items(self, rows: np.ndarray) -> np.ndarray:
        return rows

    def embed_queries(self, rows: np.ndarray) -> np.ndarray:
        return self.sign * rows


def features_of(sha256: str) -> np.ndarray:
    return np.random.default_rng(int(sha256[:8], 16)).standard_normal(6).astype(np.float32)


@pytest.fixture
def engine(database_url: str, tmp_path: Path) -> Iterator[Engine]:
    engine = make_engine(database_url)
    catalog = CatalogStore(engine)
    catalog.add_corpus(MODEL)
    catalog.add_model(ModelRecord(MODEL, MODEL, tmp_path / "model", "rev1"))
    catalog.add_items(MODEL, [Item(int(i), f"thing {i}", image_sha256=f"{i:064x}") for i in IDS])
    yield engine
    engine.dispose()


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def ask(engine: Engine, blobs: BlobStore, prompt: str, *, consent: bool = True, tier: Tier = Tier.RETRIEVED) -> NewJob:
    """A client's job, answered."""
    store = JobStore(engine, {})
    new = NewJob(project_id="p", request_id=str(uuid.uuid4()), model_id=MODEL, prompt=prompt, tier=tier, top_k=4,
                 image_sha256=blobs.put(prompt.encode()), candidates=8,
                 payload={"may_learn": "true"} if consent else {})  # fmt: skip
    job = store.create(new)[0]
    for stage in (Stage.LOOKUP, Stage.VERIFY) if tier is Tier.VERIFIED else (Stage.LOOKUP,):
        claim = store.claim(job.id, stage, "w", 30.0, "r1")
        assert claim is not None
        lines = [{"item_id": str(i), "tau": float(-i), "standard_error": None} for i in IDS[:8]]
        verified = {"teacher_id": EXACT, "draws": 16, "influences": lines[:4], "candidates": lines[4:]}
        store.complete(claim, verified if stage is Stage.VERIFY else {"influences": [], "candidates": []})
    return new


def groups() -> PromptGroups:
    return PromptGroups(letters, {"thing 100": (1, "train"), "a frozen test prompt": (2, "test")})


def intake(engine: Engine, blobs: BlobStore, gone: frozenset[int] = frozenset()) -> Intake:
    return Intake(engine, RankingStore(engine), blobs, MODEL, groups, lambda: gone)


def producer(engine: Engine, blobs: BlobStore) -> Producer:
    def candidates(planned: PlannedQuery, picture: bytes) -> Any:
        query = features_of(blobs.put(picture))
        return choose_shortlist(query, IDS, FEATURES, count=50, explore_share=0.2, seed=planned.seed)

    return Producer(engine, JobStore(engine, {}), RankingStore(engine), blobs, MODEL,
                    Labelling("abu_plus_linear", 16, {}), lambda planned: planned.prompt.encode(), candidates)


def rank_all(engine: Engine, noise: float = 0.0) -> int:
    """What verification workers do, by arithmetic: every open ranking job gets its rankings."""
    store, rankings, done = JobStore(engine, {}), RankingStore(engine), 0
    with transaction(engine) as connection:
        jobs = connection.execute(select(TABLES["jobs"].c.id).where(
            TABLES["jobs"].c.stage == "rank", TABLES["jobs"].c.state == "QUEUED")).scalars().all()  # fmt: skip
    for job_id in jobs:
        claim = store.claim(job_id, Stage.RANK, "w", 30.0)
        assert claim is not None
        payload = claim.job.payload
        lists = payload.get("candidate_ids_by_query") or [payload["candidate_ids"]] * len(payload["query_ids"])

        def write(connection: Any, payload: Any = payload, lists: Any = lists, job_id: uuid.UUID = job_id) -> None:
            for query_id, ids in zip(payload["query_ids"], lists, strict=True):
                query = rankings.query(uuid.UUID(query_id))
                assert query is not None
                items = np.array([int(i) for i in ids])
                tau = FEATURES[items - 100] @ features_of(query.image_sha256)
                tau = tau + noise * np.random.default_rng(len(items)).standard_normal(len(items))
                label = Label(items, tau.astype(np.float32), payload["candidate_set"])
                rankings.add_ranking(connection, query.id, label, job_id)

        store.complete(claim, {"influences": []}, also=write)
        done += 1
    return done


class Label:
    """A Ranking as a teacher gives it."""

    teacher_id, draws, tau_halves, samples = LINEAR, 16, None, None

    def __init__(self, item_ids: np.ndarray, tau: np.ndarray, candidate_set: str) -> None:
        self.item_ids, self.tau, self.candidate_set = item_ids, tau, candidate_set
        self.standard_error = np.full(len(tau), np.nan, np.float32)


def measurer(engine: Engine, head: PerfectHead, now: datetime, rule: DriftRule | None = None) -> Measurer:
    view = HeadView("r1", head, Calibrator())  # type: ignore[arg-type]
    catalog = CatalogStore(engine)

    def query_rows(queries: Sequence[Any]) -> np.ndarray:
        return np.stack([features_of(query.image_sha256) for query in queries])

    return Measurer(engine, MODEL, lambda: catalog.items(MODEL), lambda items: FEATURES[: len(items)], query_rows,
                    lambda release_id: view if release_id == "r1" else None, letters, "letters", 10,
                    rule or DriftRule(minimum=4), lambda: now)


def count(engine: Engine, table: str, **equal: object) -> int:
    found = TABLES[table]
    with transaction(engine) as connection:
        statement = select(func.count()).select_from(found)
        return int(connection.execute(statement.filter_by(**equal)).scalar_one())


def labelled(engine: Engine, blobs: BlobStore, prompts: Sequence[str]) -> None:
    """Drift samples asked about and ranked."""
    for prompt in prompts:
        ask(engine, blobs, prompt)
    taking, making = intake(engine, blobs), producer(engine, blobs)
    curator = Curator(making, lambda: [], lambda: 0, lambda: 0, target_open=2, max_rankings=1000, batch=64,
                      control=lambda: CurationControl(drift_share=1.0), samples=taking.samples,
                      aside=lambda control: None if taking.step(control) is None else None)
    curator.tick()
    assert curator.tick() and rank_all(engine) == 1
