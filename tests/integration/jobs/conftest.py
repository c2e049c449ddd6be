"""A job store on a fresh database, and hands on the database's clock."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator

import psycopg
import pytest
from sqlalchemy import Engine, make_url, text

from byline.db import make_engine
from byline.jobs import NewJob
from byline.jobs.store import JobStore

_TABLES = "jobs, stage_controls, corpora"


@pytest.fixture(scope="session")
def jobs_database_url(postgres_url: str, migrated_template: str) -> str:
    """One database for all tests of this folder: emptying tables is much faster than copying a database."""
    name = f"jobs_{uuid.uuid4().hex[:8]}"
    url = make_url(postgres_url)
    with psycopg.connect(url.set(drivername="postgresql").render_as_string(False), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {migrated_template}")
    return url.set(database=name).render_as_string(hide_password=False)


@pytest.fixture(scope="session")
def shared_engine(jobs_database_url: str) -> Iterator[Engine]:
    engine = make_engine(jobs_database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def engine(shared_engine: Engine) -> Engine:
    with shared_engine.begin() as connection:
        connection.execute(text(f"TRUNCATE {_TABLES} CASCADE"))
    return shared_engine


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
