"""Settings: every problem at once, secrets from files, defaults that fit together."""

from __future__ import annotations

from pathlib import Path

import pytest

from byline.config import Settings, as_environment, load_settings
from byline.embedded.discovery import Servers, announce
from byline.embedded.process import ProcessIdentity
from byline.errors import SettingsInvalid


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("BYLINE_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_all_problems_are_in_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BYLINE_DATABASE_URL", "mysql://somewhere")
    monkeypatch.setenv("BYLINE_REDIS_URL_FILE", "/nowhere/redis")
    monkeypatch.setenv("BYLINE_MAX_ATTEMPTS", "0")
    monkeypatch.setenv("BYLINE_LEASE_SECOND", "30")
    with pytest.raises(SettingsInvalid) as raised:
        load_settings(colour="red")
    message = raised.value.message
    for part in ("BYLINE_DATABASE_URL", "/nowhere/redis", "BYLINE_MAX_ATTEMPTS", "BYLINE_LEASE_SECOND:", "colour"):
        assert part in message


def test_a_metrics_port_is_no_setting_because_all_services_of_a_machine_would_bind_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BYLINE_METRICS_PORT", "9090")
    with pytest.raises(SettingsInvalid, match="BYLINE_METRICS_PORT: no such setting"):
        load_settings()


def test_a_secret_comes_from_the_file_that_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "url").write_text("postgresql://u:hunter2@db/byline\n")
    monkeypatch.setenv("BYLINE_DATABASE_URL_FILE", str(tmp_path / "url"))
    settings = load_settings()
    assert settings.database_url == "postgresql+psycopg://u:hunter2@db/byline"
    assert "hunter2" not in repr(settings)


def test_a_caller_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BYLINE_TORCH_THREADS", "4")
    monkeypatch.setenv("BYLINE_REDIS_URL", "redis://environment")
    settings = load_settings(torch_threads=2, redis_url="redis://caller")
    assert (settings.torch_threads, settings.redis_url) == (2, "redis://caller")


def test_folders_follow_the_state_directory_and_the_heartbeat_follows_the_lease(tmp_path: Path) -> None:
    settings = load_settings(state_dir="elsewhere", lease_seconds=9)
    assert settings.state_dir == tmp_path / "elsewhere"
    assert settings.blob_dir == tmp_path / "elsewhere" / "blobs"
    assert settings.release_dir == tmp_path / "elsewhere" / "releases"
    assert settings.heartbeat_seconds == pytest.approx(3)


def test_a_heartbeat_that_comes_too_late_is_refused() -> None:
    with pytest.raises(SettingsInvalid, match="heartbeat_seconds"):
        load_settings(lease_seconds=3, heartbeat_seconds=3)


def test_without_servers_the_message_says_what_to_do() -> None:
    settings = load_settings()
    with pytest.raises(SettingsInvalid, match="byline up"):
        _ = settings.database_url
    with pytest.raises(SettingsInvalid, match="BYLINE_REDIS_URL"):
        _ = settings.redis_url
    assert settings.grpc_address == "127.0.0.1:50551"


def _announced(state_dir: Path, identity: ProcessIdentity) -> Settings:
    state_dir.mkdir()
    announce(state_dir, Servers(
        database_url="postgresql+psycopg://here", redis_url="redis://here", grpc_address="127.0.0.1:1234",
        supervisor_pid=identity.pid, supervisor_created=identity.created, ready=True,
    ))
    return load_settings(state_dir=state_dir)


def test_running_servers_are_found_and_those_of_a_dead_supervisor_are_not(tmp_path: Path) -> None:
    import os

    me = ProcessIdentity.of(os.getpid())
    assert me is not None
    found = _announced(tmp_path / "alive", me)
    assert (found.database_url, found.redis_url, found.grpc_address) == (
        "postgresql+psycopg://here", "redis://here", "127.0.0.1:1234",
    )
    assert (tmp_path / "alive" / "servers.json").stat().st_mode & 0o077 == 0
    gone = _announced(tmp_path / "dead", ProcessIdentity(me.pid, me.created - 1000))
    with pytest.raises(SettingsInvalid):
        _ = gone.database_url


def test_settings_survive_the_way_to_another_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = load_settings(state_dir="here", lease_seconds=12.5, redis_url="redis://:p@h/1", feature_spec="minilm")
    for name, value in as_environment(original).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir("/")
    assert load_settings() == original


def test_teachers_and_layers_are_checked_at_start() -> None:
    with pytest.raises(SettingsInvalid) as raised:
        load_settings(curation_teacher="abu_minus", verify_selection="the_best_layers", curation_damping=0)
    message = raised.value.message
    for part in ("BYLINE_CURATION_TEACHER", "abu_plus_linear", "BYLINE_VERIFY_SELECTION", "BYLINE_CURATION_DAMPING"):
        assert part in message


def test_layers_and_damping_of_curation_and_verification_are_settings_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BYLINE_CURATION_SELECTION", "all")
    monkeypatch.setenv("BYLINE_VERIFY_DAMPING", "0.01")
    settings = load_settings()
    assert settings.curation_teacher_settings == {
        "noise": "shared", "selection": "all", "damping": 0.1, "aggregation": "sum",
        "objective": "output_norm",
    }  # fmt: skip
    assert settings.curation_family == "abu_plus_linear+output_norm"
    assert settings.verify_teacher_settings == {
        "selection": "cross_attention_kv", "damping": 0.01, "aggregation": "sum",
        "objective": "output_norm",
    }  # fmt: skip


def test_an_aggregation_the_exact_form_cannot_do_is_refused_at_the_start() -> None:
    with pytest.raises(SettingsInvalid, match="verify_aggregation 'unit'"):
        load_settings(verify_aggregation="unit")
    assert load_settings(verify_teacher="abu_plus_linear", verify_aggregation="unit").verify_aggregation == "unit"
