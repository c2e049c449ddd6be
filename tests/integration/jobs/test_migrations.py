"""Migrations make the schema the models describe, from nothing, together, and back."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text
from sqlalchemy.exc import IntegrityError

from byline.db import make_engine, migrate, transaction
from byline.db.migration import alembic_config, head, is_current
from byline.db.models import Base
from byline.errors import DatabaseUnavailable


def test_the_migrated_schema_is_the_models_schema(database_url: str):
    with transaction(make_engine(database_url)) as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_services_that_start_together_may_all_migrate(empty_database_url: str):
    engine = make_engine(empty_database_url)
    assert not is_current(engine)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(migrate, [empty_database_url] * 4)) == {head()}
    assert is_current(engine)
    engine.dispose()


def test_migrations_can_be_undone(empty_database_url: str):
    migrate(empty_database_url)
    engine = make_engine(empty_database_url)
    config = alembic_config()
    with transaction(engine) as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    assert inspect(engine).get_table_names() == ["alembic_version"]
    engine.dispose()


def test_ranking_jobs_from_before_batches_keep_their_query(empty_database_url: str):
    engine = make_engine(empty_database_url)
    config = alembic_config()
    query = str(uuid.uuid4())
    with transaction(engine) as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0004")
        for kind, asked in (("ranking", query), ("ranking", "no uuid"), ("attribution", query)):
            connection.execute(
                text(
                    "INSERT INTO jobs (id, project_id, request_id, fingerprint, kind, model_id, prompt, tier,"
                    " verification, top_k, candidates, payload, state, stage, max_attempts, expire_time)"
                    " VALUES (gen_random_uuid(), 'p', gen_random_uuid()::text, '', :kind, 'm', '', 'VERIFIED',"
                    " 'REQUIRED', 1, 1, jsonb_build_object('query_id', CAST(:asked AS text), 'teacher', 'abu'),"
                    " 'QUEUED', 'rank', 3, now())"
                ),
                {"kind": kind, "asked": asked},
            )
        command.upgrade(config, "head")
        rows = connection.execute(text("SELECT query_id, teacher FROM job_queries")).all()
    engine.dispose()
    assert [(str(row.query_id), row.teacher) for row in rows] == [(query, "abu")]


def test_the_database_itself_refuses_to_leave_a_terminal_state(store, engine, new_job):
    job, _ = store.create(new_job())
    store.cancel("p", job.id)
    with pytest.raises(IntegrityError, match="stays so"), engine.begin() as connection:
        connection.execute(text("UPDATE jobs SET state = 'QUEUED' WHERE id = :id"), {"id": job.id})


def test_a_database_that_is_away_is_a_typed_error():
    engine = make_engine("postgresql://nobody@127.0.0.1:1/none")
    with pytest.raises(DatabaseUnavailable), transaction(engine):
        pass
