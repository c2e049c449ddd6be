"""A job store on a fresh database, and hands on the database's clock."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import Engine, text

from byline.db import make_engine
from byline.jobs import NewJob
from byline.jobs.store import JobStore


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = make_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def store(engine: Engine) -> JobStore:
    return JobStore(engine, bounds={}, rng=random.Random(1))


@pytest.fixture
def new_job() -> Callable[..., NewJob]:
    def make(request_id: str | None = None, **fields: object) -> NewJob:
        values: dict[str, object] = {
            "project_id": "p",
            "request_id": request_id or str(uuid.uuid4()),
            "model_id": "m",
            "prompt": "a cat",
            "image_sha256": "0" * 64,
            **fields,
        }
        return NewJob(**values)  # type: ignore[arg-type]

    return make


@pytest.fixture
def let_pass(engine: Engine) -> Callable[..., None]:
    """Move a time of a job into the past: nobody sleeps, and the database's clock stays the only one."""

    def move(job_id: uuid.UUID, *columns: str) -> None:
        assignments = ", ".join(f"{column} = now() - interval '1 hour'" for column in columns)
        with engine.begin() as connection:
            connection.execute(text(f"UPDATE jobs SET {assignments} WHERE id = :id"), {"id": job_id})

    return move
