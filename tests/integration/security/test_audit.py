"""The audit on a real Postgres: it cannot be rewritten, and what gets round that is found."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from byline.db import make_engine
from byline.jobs import Stage
from byline.jobs.model import NewJob
from byline.jobs.states import Kind
from byline.jobs.store import JobStore
from byline.security.audit import ALLOWED, AuditLog, Head, event
from byline.security.errors import AuditBroken
from byline.security.signing import Keyring

KEY = Keyring.parse("k" * 40)


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = make_engine(database_url, pool_size=3)
    yield engine
    engine.dispose()


def filled(engine: Engine, keyring: Keyring, events: int = 6) -> AuditLog:
    log = AuditLog(engine, keyring)
    for number in range(events):
        log.record(event("ann", "PauseStage", f"stages/{number}", ALLOWED, detail={"reason": "é", "share": 0.25}))
    assert log.seal() == events and log.seal() == 0
    return log


def behind_its_back(engine: Engine, statement: str) -> None:
    """What somebody may do who owns the database."""
    with engine.begin() as connection:
        connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        connection.exec_driver_sql(statement)


@pytest.mark.parametrize("table", ["audit_events", "audit_chain"])
@pytest.mark.parametrize("change", ["DELETE FROM {}", "UPDATE {} SET at = now()", "TRUNCATE {} CASCADE"])
def test_the_database_refuses_to_change_or_delete_what_stands_in_the_audit(
    engine: Engine, table: str, change: str
) -> None:
    filled(engine, Keyring())
    with pytest.raises(DBAPIError, match="append-only"), engine.begin() as connection:
        connection.exec_driver_sql(change.format(table))


@pytest.mark.parametrize("keyring", [Keyring(), KEY], ids=["plain", "signed"])
@pytest.mark.parametrize(
    "change",
    [
        "UPDATE audit_events SET principal = 'bob' WHERE id = (SELECT min(id) + 2 FROM audit_events)",
        "UPDATE audit_events SET detail = jsonb_set(detail, '{share}', '0.5')",
        "DELETE FROM audit_chain WHERE seq = 3",
        "DELETE FROM audit_events WHERE id = (SELECT event_id FROM audit_chain WHERE seq = 4)",
        "UPDATE audit_chain SET hash = sha256('x') WHERE seq = 6",
    ],
)
def test_whoever_gets_round_that_breaks_the_chain(engine: Engine, keyring: Keyring, change: str) -> None:
    log = filled(engine, keyring)
    verified = log.verify()
    assert (verified.head.seq, verified.signed, verified.unsealed) == (6, 6 if keyring else 0, 0)
    behind_its_back(engine, change)
    with pytest.raises(AuditBroken):
        log.verify()


def test_an_end_noted_elsewhere_shows_that_the_tail_was_cut_off_or_the_chain_made_anew(engine: Engine) -> None:
    log = filled(engine, Keyring())
    noted = Head.parse(str(log.head()))
    assert log.verify(noted).head == noted
    behind_its_back(engine, "DELETE FROM audit_chain WHERE seq > 4")
    behind_its_back(engine, "DELETE FROM audit_events WHERE id NOT IN (SELECT event_id FROM audit_chain)")
    assert log.verify().head.seq == 4  # by itself a shorter chain is a good chain
    with pytest.raises(AuditBroken, match="before the noted"):
        log.verify(noted)
    log.record(event("eve", "PauseStage", "stages/4", ALLOWED))
    log.record(event("eve", "PauseStage", "stages/5", ALLOWED))
    log.seal()
    with pytest.raises(AuditBroken, match="made anew"):
        log.verify(noted)


def test_without_the_key_a_signed_chain_can_neither_be_continued_nor_made_anew(engine: Engine) -> None:
    signed = filled(engine, KEY)
    forger = AuditLog(engine, Keyring())
    signed.record(event("eve", "PauseStage", "x", ALLOWED))
    assert forger.seal() == 1
    with pytest.raises(AuditBroken, match="not signed"):
        signed.verify()
    with pytest.raises(AuditBroken, match="does not have"):
        AuditLog(engine, Keyring.parse("other" * 10)).verify()


def test_an_event_that_commits_late_is_linked_after_those_that_overtook_it(engine: Engine) -> None:
    log = AuditLog(engine, Keyring())
    with engine.connect() as slow:
        slow.execute(event("ann", "PauseStage", "first", ALLOWED))
        log.record(event("bob", "PauseStage", "second", ALLOWED))
        assert log.seal() == 1
        slow.commit()
    assert log.verify().unsealed == 1
    assert log.seal() == 1 and log.verify().head.seq == 2


def test_every_job_of_a_client_and_every_answer_with_its_release_is_in_the_audit(engine: Engine) -> None:
    store = JobStore(engine, {})
    new = NewJob(
        project_id="acme", request_id=str(uuid.uuid4()), model_id="m", prompt="my secret prompt", image_sha256="0" * 64,
        principal="key:1",
    )  # fmt: skip
    job, _ = store.create(new)
    store.create(new)  # the same request again asks nothing new
    ranking = NewJob(project_id="curation", request_id="r", model_id="m", prompt="", kind=Kind.RANKING)
    store.create(ranking)
    claim = store.claim(job.id, Stage.LOOKUP, "worker-1", 30.0, "release-7")
    assert claim is not None
    store.complete(claim, {"influences": []})
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT * FROM audit_events ORDER BY id")).mappings().all()
    assert [row["action"] for row in rows] == ["CreateAttributionJob", "AnswerAttributionJob"]
    asked, answered = rows
    assert (asked["principal"], asked["project_id"], asked["request_id"]) == ("key:1", "acme", new.request_id)
    assert answered["detail"]["release"] == "release-7" and answered["detail"]["stage"] == "lookup"
    assert all(row["resource"] == f"attributionJobs/{job.id}" for row in rows)
    assert "my secret prompt" not in str([dict(row) for row in rows])
