"""The registry on a real Postgres: compare-and-set, rollback, judgement, notification."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from byline.db.listen import RELEASES, Listener
from byline.db.session import make_engine
from byline.errors import ReleaseChanged, ReleaseNotEligible, ReleaseNotFound
from byline.releases.manifest import (
    REQUIRED_FILES,
    FileEntry,
    LabelSet,
    RefreshSection,
    RefreshTrigger,
    ReleaseManifest,
)
from byline.releases.registry import ReleaseRegistry, ReleaseState

CREATED = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = make_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def registry(engine: Engine) -> ReleaseRegistry:
    registry = ReleaseRegistry(engine)
    for number in range(1, 4):
        registry.register(manifest(f"r{number}", minutes=number), Path(f"/releases/r{number}"))
    return registry


def manifest(release_id: str, model_id: str = "m", minutes: int = 0, teacher_id: str = "t") -> ReleaseManifest:
    return ReleaseManifest(
        release_id=release_id, model_id=model_id, model_revision="rev", corpus_id="c",
        created_at=CREATED + timedelta(minutes=minutes), feature_spec="minilm", preprocessing_hash="h",
        feature_dim=384, embedding_dim=8, items=3, index_factory="Flat", teacher_id=teacher_id,
        labels=LabelSet(queries=5, digest="d"), metrics={"map": 0.5},
        files={name: FileEntry(sha256="0" * 64, bytes=1) for name in REQUIRED_FILES},
    )  # fmt: skip


def test_registering_is_idempotent_and_an_id_is_never_reused(registry: ReleaseRegistry) -> None:
    again = registry.register(manifest("r1", minutes=1), Path("/releases/r1"))
    assert (again.state, again.metrics) == (ReleaseState.BUILT, {"map": 0.5})
    with pytest.raises(ReleaseNotEligible):
        registry.register(manifest("r1", teacher_id="another"), Path("/releases/r1"))
    assert [r.release_id for r in registry.list("m")] == ["r3", "r2", "r1"]
    assert registry.get("r1").manifest == manifest("r1", minutes=1)


def test_activation_moves_one_pointer_and_the_states_follow(registry: ReleaseRegistry) -> None:
    assert registry.active("m") is None
    registry.validate("r1", {"gate": "passed"})
    first = registry.activate("m", "r1", expected_epoch=0)
    assert (first.release_id, first.previous_release_id, first.epoch) == ("r1", None, 1)
    second = registry.activate("m", "r2", expected_epoch=1)
    assert (second.release_id, second.previous_release_id, second.epoch) == ("r2", "r1", 2)
    assert registry.active("m") == second
    states = {r.release_id: r.state for r in registry.list("m")}
    assert states == {"r1": ReleaseState.RETIRED, "r2": ReleaseState.ACTIVE, "r3": ReleaseState.BUILT}
    assert registry.activate("m", "r2").epoch == 2
    assert registry.get("r1").metrics == {"map": 0.5, "gate": "passed"}


def test_rollback_is_the_same_call_with_the_previous_release(registry: ReleaseRegistry) -> None:
    with pytest.raises(ReleaseNotEligible):
        registry.rollback("m")
    registry.activate("m", "r1")
    with pytest.raises(ReleaseNotEligible):
        registry.rollback("m")
    registry.activate("m", "r2")
    back = registry.rollback("m")
    assert (back.release_id, back.previous_release_id, back.epoch) == ("r1", "r2", 3)
    assert registry.get("r2").state is ReleaseState.RETIRED


def test_a_stale_epoch_changes_nothing(registry: ReleaseRegistry) -> None:
    registry.activate("m", "r1")
    for call in (
        lambda: registry.activate("m", "r2", expected_epoch=0),
        lambda: registry.rollback("m", expected_epoch=7) if registry.activate("m", "r1") else None,
    ):
        with pytest.raises((ReleaseChanged, ReleaseNotEligible)):
            call()
    active = registry.active("m")
    assert active is not None
    assert (active.release_id, active.epoch) == ("r1", 1)


def test_of_concurrent_activations_with_one_epoch_exactly_one_wins(registry: ReleaseRegistry) -> None:
    outcomes: list[str] = []
    start = threading.Barrier(6)

    def activate(release_id: str) -> None:
        start.wait(10)
        try:
            registry.activate("m", release_id, expected_epoch=0)
            outcomes.append(release_id)
        except ReleaseChanged:
            outcomes.append("changed")

    threads = [threading.Thread(target=activate, args=(f"r{1 + n % 3}",)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    winners = [outcome for outcome in outcomes if outcome != "changed"]
    assert len(outcomes) == 6
    assert len(winners) == 1
    active = registry.active("m")
    assert active is not None
    assert (active.release_id, active.epoch) == (winners[0], 1)
    assert [r.release_id for r in registry.list("m") if r.state is ReleaseState.ACTIVE] == winners


def test_a_rejected_unknown_or_foreign_release_is_never_activated(registry: ReleaseRegistry) -> None:
    rejected = registry.reject("r3", "mAP fell", {"map_difference": -0.1})
    assert (rejected.state, rejected.reason) == (ReleaseState.REJECTED, "mAP fell")
    registry.register(manifest("other", model_id="another"), Path("/releases/other"))
    for release_id, error in (("r3", ReleaseNotEligible), ("other", ReleaseNotEligible), ("no", ReleaseNotFound)):
        with pytest.raises(error):
            registry.activate("m", release_id)
    assert registry.active("m") is None
    registry.activate("m", "r1")
    with pytest.raises(ReleaseNotEligible):
        registry.reject("r1", "too late")


def test_an_activation_is_announced_and_audited(registry: ReleaseRegistry, engine: Engine, database_url: str) -> None:
    heard, connected, stop = threading.Event(), threading.Event(), threading.Event()
    payloads: list[str] = []

    def on_event(channel: str, payload: str) -> None:
        payloads.append(payload)
        heard.set()

    listener = Listener(database_url, [RELEASES], stop, on_event, connected.set)
    listener.start()
    assert connected.wait(10)
    registry.activate("m", "r1", reason="first", principal="night shift")
    assert heard.wait(10)
    stop.set()
    listener.join(10)
    assert payloads == ["m"]
    with engine.connect() as connection:
        event = connection.execute(text("SELECT principal, action, resource, detail FROM audit_events")).one()
    assert event[:3] == ("night shift", "ActivateRelease", "releases/r1")
    assert event[3]["state"] == "BUILT"


def _of_refresh(release_id: str, parent: str, minutes: int, start: str, trigger: str) -> ReleaseManifest:
    made = RefreshSection(triggers=(RefreshTrigger(trigger=trigger, detail="x"),), snapshot_at=CREATED, start=start,
                          held_out_split="test", held_out_queries=9, held_out_digest="d")  # fmt: skip
    return manifest(release_id, minutes=minutes).model_copy(update={"refresh": made, "parent": parent})


def test_a_rollback_is_remembered_until_a_newer_head_is_activated(registry: ReleaseRegistry) -> None:
    assert registry.rolled_back_from("m") is None
    for release_id in ("r1", "r2"):
        registry.activate("m", release_id)
        assert registry.rolled_back_from("m") is None
    registry.rollback("m")
    assert registry.rolled_back_from("m") == "r2" and registry.rolled_back_from("another") is None
    registry.rollback("m")
    assert registry.rolled_back_from("m") is None
    registry.rollback("m")
    registry.activate("m", "r3")
    assert registry.rolled_back_from("m") is None
    registry.activate("m", "r1")
    assert registry.rolled_back_from("m") == "r3"


def test_a_release_of_the_same_head_for_a_changed_corpus_does_not_end_the_hold(registry: ReleaseRegistry) -> None:
    registry.activate("m", "r1")
    registry.activate("m", "r2")
    registry.rollback("m")
    for number, (parent, start, trigger) in enumerate((("r1", "kept", "corpus"), ("k4", "kept", "corpus"))):
        registry.register(_of_refresh(f"k{4 + number}", parent, 4 + number, start, trigger), Path("/releases/k"))
        registry.activate("m", f"k{4 + number}")
        assert registry.rolled_back_from("m") == "r2"
    # Asked for by an operator, even the same head is his decision.
    registry.register(_of_refresh("k6", "k5", 6, "kept", "operator"), Path("/releases/k6"))
    registry.activate("m", "k6")
    assert registry.rolled_back_from("m") is None
