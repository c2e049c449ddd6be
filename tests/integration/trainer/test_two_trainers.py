"""Two trainers of one model: one works at a time, and even two that both worked cannot both activate."""

from __future__ import annotations

import threading
import uuid
from datetime import timedelta
from pathlib import Path

import pytest

from byline.db.session import make_engine
from byline.errors import LabelsNotUsable
from byline.releases.garbage import KeepRule
from byline.releases.registry import ReleaseRegistry, ReleaseState
from byline.releases.requests import RefreshRequests
from services.trainer.gate import GateLimits
from services.trainer.observe import Observer
from services.trainer.schedule import DriftAlarm, RefreshRule
from services.trainer.turn import my_turn
from services.trainer.work import TrainerWork

from .test_refresh import LENIENT, NOW, World, _add, _refresher, engine, world  # noqa: F401 - fixtures


class NoAlarm:
    """Drift's side of the trainer; remembers what it was told."""

    def __init__(self) -> None:
        self.alarm: DriftAlarm | None = None
        self.closed_by: list[str] = []

    def open(self, model_id: str) -> DriftAlarm | None:
        return self.alarm

    def answered(self, alarm: DriftAlarm, release_id: str) -> None:
        self.alarm = None
        self.closed_by.append(release_id)


def work_on(engine, world: World, tmp_path: Path, alarms: NoAlarm | None = None, **changes) -> TrainerWork:  # noqa: F811
    refresher = _refresher(engine, world, tmp_path, epochs=2, **changes)
    observer = Observer(engine, "toy", "abu_plus_linear", alarms)
    rule = RefreshRule(8, timedelta(hours=1), timedelta(0))
    return TrainerWork(engine, "toy", tmp_path / "releases", observer, rule, lambda: refresher, KeepRule(), 0, alarms)


def test_two_trainers_that_judged_against_the_same_release_cannot_both_activate(
    engine, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
):
    """Without the turn, which only saves work: both fit, both pass, and the later one is refused by the epoch."""
    _add(engine, world, "train", range(20))
    _add(engine, world, "validation", range(12))
    _refresher(engine, world, tmp_path, epochs=2).run_once(now=NOW, seed=0)
    registry = ReleaseRegistry(engine)
    first = registry.active("toy")
    both, outcomes = threading.Barrier(2, timeout=120), []
    validate = ReleaseRegistry.validate

    def together(self: ReleaseRegistry, *arguments: object) -> object:
        done = validate(self, *arguments)  # type: ignore[arg-type]
        both.wait()
        return done

    monkeypatch.setattr(ReleaseRegistry, "validate", together)

    def train(minutes: int) -> None:
        own = make_engine(engine.url.render_as_string(hide_password=False), 3)
        refresher = _refresher(own, world, tmp_path, epochs=2)
        outcomes.append(refresher.run_once(now=NOW + timedelta(minutes=minutes), seed=minutes))
        own.dispose()

    threads = [threading.Thread(target=train, args=(minutes,)) for minutes in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=240)
    assert sorted(outcome.activated for outcome in outcomes) == [False, True]
    active = registry.active("toy")
    assert active is not None and first is not None and active.epoch == first.epoch + 1
    states = sorted(record.state for record in registry.list("toy"))
    assert states == [ReleaseState.ACTIVE, ReleaseState.RETIRED, ReleaseState.VALIDATED]


def test_a_trainer_waits_while_another_has_the_turn_and_the_dead_give_it_back(
    engine, world: World, tmp_path: Path  # noqa: F811
):
    _add(engine, world, "train", range(20))
    _add(engine, world, "validation", range(12))
    work = work_on(engine, world, tmp_path)
    other = make_engine(engine.url.render_as_string(hide_password=False), 1)
    with my_turn(other, "toy") as mine:
        assert mine
        assert work.run(NOW) is None and ReleaseRegistry(engine).list("toy") == []
        with my_turn(engine, "another model") as free:
            assert free
    other.dispose()
    assert work.run(NOW) is not None


def test_a_request_is_answered_with_the_release_or_with_why_there_is_none(
    engine, world: World, tmp_path: Path  # noqa: F811
):
    requests, work = RefreshRequests(engine), work_on(engine, world, tmp_path)
    first = requests.ask("toy", uuid.UUID(int=1), "ann", "no labels yet")
    assert requests.ask("toy", uuid.UUID(int=2), "bob").request_id == first.request_id
    with pytest.raises(LabelsNotUsable):
        work.run(NOW)
    failed = requests.get(first.request_id)
    assert failed.release_id is None and (failed.error or "").startswith("LABELS_NOT_USABLE")
    _add(engine, world, "train", range(4))
    _add(engine, world, "validation", range(3))
    requests.ask("toy", uuid.UUID(int=3), "ann", "cats look wrong")
    outcome = work.run(NOW)
    assert outcome is not None and requests.get(uuid.UUID(int=3)).release_id == outcome.release_id
    section = ReleaseRegistry(engine).get(outcome.release_id).manifest.refresh
    assert section is not None and [one.detail for one in section.triggers] == ["ann: cats look wrong"]
    assert work.run(NOW + timedelta(minutes=1)) is None


def test_a_drift_alarm_leads_to_a_release_that_closes_it(engine, world: World, tmp_path: Path):  # noqa: F811
    _add(engine, world, "train", range(20))
    _add(engine, world, "validation", range(12))
    alarms = NoAlarm()
    work = work_on(engine, world, tmp_path, alarms, limits=LENIENT)
    assert work.run(NOW) is not None and work.run(NOW) is None
    alarms.alarm = DriftAlarm(NOW + timedelta(minutes=1), "overlap fell to 0.3")
    outcome = work.run(NOW + timedelta(minutes=2))
    assert outcome is not None and [one.trigger for one in outcome.due] == ["drift"]
    assert outcome.activated
    assert alarms.alarm is None and alarms.closed_by == [outcome.release_id]


def test_a_drift_alarm_that_led_to_a_refused_candidate_stays_open(engine, world: World, tmp_path: Path):  # noqa: F811
    _add(engine, world, "train", range(20))
    _add(engine, world, "validation", range(12))
    alarms = NoAlarm()
    work = work_on(engine, world, tmp_path, alarms, limits=GateLimits(map_floor=0.999, tolerance=1.0, confidence=0.95))
    alarms.alarm = alarm = DriftAlarm(NOW, "overlap fell to 0.3")
    outcome = work.run(NOW + timedelta(minutes=2))
    assert outcome is not None and not outcome.activated and "drift" in [one.trigger for one in outcome.due]
    assert alarms.alarm is alarm and alarms.closed_by == []
