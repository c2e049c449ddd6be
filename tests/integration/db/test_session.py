"""Connections that the server closed behind our back: found before use, or told as what they are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, text

from byline.db import make_engine, session
from byline.errors import DatabaseUnavailable


@pytest.fixture
def engines(postgres_url: str) -> Iterator[tuple[Engine, Engine]]:
    """One under test, one to end its connections with."""
    made = make_engine(postgres_url, 2), make_engine(postgres_url, 1)
    yield made
    for engine in made:
        engine.dispose()


def pid(engine: Engine) -> int:
    with session.transaction(engine) as connection:
        return int(connection.execute(text("SELECT pg_backend_pid()")).scalar_one())


def closed(engines: tuple[Engine, Engine]) -> int:
    engine, other = engines
    gone = pid(engine)
    with other.begin() as connection:
        assert connection.execute(text("SELECT pg_terminate_backend(:pid, 10000)"), {"pid": gone}).scalar_one()
    return gone


def test_a_connection_that_lay_unused_is_checked_and_replaced(
    engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "CHECK_AFTER_S", 0.0)
    assert pid(engines[0]) == pid(engines[0])
    gone = closed(engines)
    assert pid(engines[0]) != gone


def test_one_that_was_just_used_is_not_checked_and_its_loss_is_told_once(
    engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "CHECK_AFTER_S", 3600.0)
    gone = closed(engines)
    with pytest.raises(DatabaseUnavailable):
        pid(engines[0])
    assert pid(engines[0]) != gone


def test_single_statements_commit_each_by_itself(engines: tuple[Engine, Engine]) -> None:
    with pytest.raises(ZeroDivisionError), session.single_statements(engines[0]) as connection:
        connection.execute(text("CREATE TABLE alone (n int)"))
        raise ZeroDivisionError
    with session.single_statements(engines[0]) as connection:
        assert connection.execute(text("SELECT count(*) FROM alone")).scalar_one() == 0
        connection.execute(text("DROP TABLE alone"))
    with pytest.raises(ZeroDivisionError), session.transaction(engines[0]) as connection:  # its mode was given back
        connection.execute(text("CREATE TABLE together (n int)"))
        raise ZeroDivisionError
    with session.transaction(engines[0]) as connection:
        assert connection.execute(text("SELECT to_regclass('together')")).scalar_one() is None
