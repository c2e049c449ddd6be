"""``byline keys`` and ``byline audit`` on a real Postgres: what an operator types, and what comes back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sqlalchemy import text
from typer.testing import CliRunner

from byline.cli.audit import app as audit
from byline.cli.keys import app as keys
from byline.db import make_engine
from byline.errors import InvalidRequest, SettingsInvalid
from byline.security.errors import AuditBroken, KeyNotFound, Unauthenticated
from byline.security.keys import KeyStore


@pytest.fixture(autouse=True)
def configured(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BYLINE_DATABASE_URL", database_url)
    monkeypatch.setenv("BYLINE_STATE_DIR", str(tmp_path))


def test_a_key_is_shown_once_works_is_listed_without_its_secret_and_ends(database_url: str) -> None:
    run = CliRunner()
    made = run.invoke(keys, ["create", "--name", "web", "--project", "acme", "--scope", "jobs:read", "--days", "30"])
    assert made.exit_code == 0
    token = made.stdout.strip().splitlines()[0]
    engine = make_engine(database_url, pool_size=1)
    store = KeyStore(engine)
    principal = store.authenticate(token)
    assert (principal.project_id, set(principal.scopes)) == ("acme", {"jobs:read"})
    listed = run.invoke(keys, ["list", "--json"])
    (entry,) = json.loads(listed.stdout)
    assert (entry["name"], entry["project_id"], entry["state"]) == ("web", "acme", "valid")
    assert token.rpartition("_")[2] not in listed.stdout + run.invoke(keys, ["list"]).stdout
    assert run.invoke(keys, ["revoke", entry["id"]]).exit_code == 0
    assert json.loads(run.invoke(keys, ["list", "--json"]).stdout)[0]["state"] == "revoked"
    with pytest.raises(Unauthenticated):
        store.authenticate(token)
    engine.dispose()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["create", "--name", "x", "--project", "acme", "--scope", "operate"], InvalidRequest),
        (["create", "--name", "x", "--scope", "everything"], InvalidRequest),
        (["create", "--name", "x", "--project", "acme", "--operator"], InvalidRequest),
        (["create", "--name", "x", "--project", "../acme"], InvalidRequest),
        (["create", "--name", "x", "--days", "-1"], InvalidRequest),
        (["revoke", "0000"], KeyNotFound),
        (["sign-release", "r1"], SettingsInvalid),
    ],
)
def test_what_cannot_be_done_is_said(arguments: list[str], error: type[Exception]) -> None:
    assert isinstance(CliRunner().invoke(keys, arguments).exception, error)


def test_the_audit_is_listed_verified_and_found_out(database_url: str) -> None:
    run = CliRunner()
    run.invoke(keys, ["create", "--name", "ops", "--operator"])
    verified = json.loads(run.invoke(audit, ["verify", "--json"]).stdout)
    assert (verified["links"], verified["unsealed"]) == (1, 0)
    assert "holds" in run.invoke(audit, ["verify", "--head", verified["head"]]).stdout
    (event,) = json.loads(run.invoke(audit, ["list", "--json", "--action", "CreateApiKey"]).stdout)
    assert event["detail"]["name"] == "ops" and event["seq"] == 1
    assert "CreateApiKey" in run.invoke(audit, ["list"]).stdout
    assert isinstance(run.invoke(audit, ["verify", "--head", "x"]).exception, InvalidRequest)
    engine = make_engine(database_url, pool_size=1)
    with engine.begin() as connection:
        connection.execute(text("SET LOCAL session_replication_role = replica"))
        connection.execute(text("UPDATE audit_events SET principal = 'nobody'"))
    engine.dispose()
    assert isinstance(run.invoke(audit, ["verify"]).exception, AuditBroken)
