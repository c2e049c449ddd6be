"""The private servers: real, private, and with their data kept through stops and kills."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import redis

from byline.embedded import postgres as postgres_module
from byline.embedded.postgres import PrivatePostgres
from byline.embedded.process import ProcessIdentity
from byline.embedded.valkey import PrivateValkey
from byline.errors import ServerNotStarted


def _plain(url: str) -> str:
    return url.replace("+psycopg", "")


@pytest.fixture
def folder(server_directory: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    path = server_directory / request.node.name.replace("[", "_").replace("]", "_")
    path.mkdir()
    yield path


def test_postgres_keeps_its_rows_through_a_clean_stop_and_through_kill_9(folder: Path) -> None:
    server = PrivatePostgres(folder, die_with_parent=True)
    server.start()
    with psycopg.connect(_plain(server.url), autocommit=True) as connection:
        connection.execute("CREATE TABLE kept (n int)")
        connection.execute("INSERT INTO kept SELECT generate_series(1, 300)")
    server.stop()
    assert server.process.popen.returncode == 0

    server.start()
    with psycopg.connect(_plain(server.url), autocommit=True) as connection:
        connection.execute("INSERT INTO kept VALUES (301)")
    os.kill(server.process.identity.pid, signal.SIGKILL)
    server.process.popen.wait(10)

    server.start()
    with psycopg.connect(_plain(server.url)) as connection:
        assert connection.execute("SELECT count(*) FROM kept").fetchone() == (301,)
    server.stop()


def test_postgres_refuses_a_wrong_password(folder: Path) -> None:
    server = PrivatePostgres(folder, die_with_parent=True)
    server.start()
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(host="127.0.0.1", port=server.port, user="byline", password="wrong", dbname="byline")
    server.stop()
    assert (folder / "password").stat().st_mode & 0o077 == 0


def test_postgres_reports_the_servers_own_words_when_it_cannot_start(folder: Path) -> None:
    holder = PrivateValkey(folder / "holder", die_with_parent=True)
    holder.start()
    server = PrivatePostgres(folder / "pg", port=holder.port, die_with_parent=True)
    with pytest.raises(ServerNotStarted, match="could not bind|Address already in use"):
        server.start()
    holder.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's server changes its user")
def test_root_runs_postgres_as_nobody_even_where_nobody_may_not_enter(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = folder / "home"
    closed.mkdir(mode=0o700)
    install = postgres_module.installed_binaries().parent
    (closed / "venv").symlink_to(install)
    monkeypatch.setattr(postgres_module, "_traversable", lambda path: False)
    server = PrivatePostgres(closed / "state", die_with_parent=True)
    server.start()
    try:
        with psycopg.connect(_plain(server.url)) as connection:
            row = connection.execute("SHOW data_directory").fetchone()
        assert row is not None and row[0].startswith("/var/tmp/byline-")
        assert closed.stat().st_mode & 0o077 == 0
        status = Path(f"/proc/{server.process.identity.pid}/status").read_text()
        assert "Uid:\t0\t" not in status
    finally:
        server.stop()
        postgres_module.shutil.rmtree(Path(row[0]).parent)


def test_valkey_keeps_its_keys_evicts_nothing_and_wants_a_password(folder: Path) -> None:
    server = PrivateValkey(folder, die_with_parent=True)
    server.start()
    client = redis.Redis.from_url(server.url)
    client.set("kept", "yes")
    assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    client.execute_command("WAITAOF", 1, 0, 5000)
    with pytest.raises(redis.AuthenticationError):
        redis.Redis(port=server.port).ping()
    os.kill(server.process.identity.pid, signal.SIGKILL)
    server.process.popen.wait(10)
    server.start()
    assert redis.Redis.from_url(server.url).get("kept") == b"yes"
    server.stop()
    assert server.process.popen.returncode == 0


def test_an_identity_is_not_fooled_by_a_process_of_another_time() -> None:
    me = ProcessIdentity.of(os.getpid())
    assert me is not None and me.alive()
    assert not ProcessIdentity(me.pid, me.created - 60).alive()
