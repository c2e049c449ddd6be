"""``byline releases``: what is printed and what is asked of the gateway."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any, Self

import pytest
from typer.testing import CliRunner

from byline.cli import releases as command
from byline.client import ActiveRelease, Release
from byline.errors import ReleaseNotFound

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)


def release(release_id: str, state: str) -> Release:
    return Release(
        name=f"models/openclipart/releases/{release_id}", state=state, parent="", model_revision="rev",
        corpus="corpora/c", feature_spec="minilm", embedding_dim=8, items=60, teacher_id="t", label_queries=200,
        metrics={"map.head": 0.5123}, reason="first [one]", create_time=NOW,
    )  # fmt: skip


class FakeClient:
    """Answers as the gateway does and remembers what was asked."""

    asked: list[tuple[Any, ...]] = []

    def __init__(self, address: str, project: str, **security: Any) -> None:
        self.address = address

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def releases(self, model: str) -> tuple[list[Release], ActiveRelease]:
        name = "models/openclipart/releases/r2"
        return [release("r2", "ACTIVE"), release("r1", "RETIRED")], ActiveRelease(name, "", 1, NOW)

    def activate(self, *arguments: Any) -> ActiveRelease:
        self.asked.append(arguments)
        return ActiveRelease(f"models/m/releases/{arguments[1]}", "models/m/releases/r2", 2, NOW)

    def rollback(self, *arguments: Any) -> ActiveRelease:
        self.asked.append(arguments)
        return ActiveRelease("models/m/releases/r1", "models/m/releases/r2", 3, NOW)


@pytest.fixture(autouse=True)
def client(monkeypatch: pytest.MonkeyPatch) -> type[FakeClient]:
    monkeypatch.setattr(command, "Client", FakeClient)
    monkeypatch.setenv("COLUMNS", "200")
    FakeClient.asked = []
    return FakeClient


def test_the_list_marks_the_active_release() -> None:
    output = CliRunner().invoke(command.app, ["list"], catch_exceptions=False).output
    assert "active: r2, epoch 1" in output
    row = next(line for line in output.splitlines() if "r2" in line)
    assert "→" in row
    assert "0.512" in row
    assert "first [one]" in row
    listed = json.loads(CliRunner().invoke(command.app, ["list", "--json"], catch_exceptions=False).output)
    assert [r["state"] for r in listed["releases"]] == ["ACTIVE", "RETIRED"]


def test_one_release_is_shown_or_said_not_to_exist() -> None:
    assert "metrics.map.head" in CliRunner().invoke(command.app, ["show", "r1"], catch_exceptions=False).output
    assert isinstance(CliRunner().invoke(command.app, ["show", "r9"]).exception, ReleaseNotFound)


def test_activation_and_rollback_pass_epoch_and_reason_on(client: type[FakeClient]) -> None:
    run = CliRunner()
    said = run.invoke(command.app, ["activate", "r1", "--epoch", "1", "--reason", "why"], catch_exceptions=False)
    assert said.output.strip() == "active: r1, epoch 2; before: r2"
    run.invoke(command.app, ["rollback"], catch_exceptions=False)
    assert client.asked == [("openclipart", "r1", 1, "why"), ("openclipart", None, "")]
