"""The loop goes on whatever a refresh does."""

from __future__ import annotations

import threading
import uuid
from datetime import UTC, datetime, timedelta

from byline.errors import DatabaseUnavailable, LabelsNotUsable
from byline.evaluation.head_report import HeadReport
from services.trainer.candidates import Start
from services.trainer.gate import GateDecision
from services.trainer.loop import TrainerLoop
from services.trainer.refresh import RefreshOutcome
from services.trainer.schedule import LastRefresh, Observed, RefreshAsked, RefreshRule

NOW = datetime(2026, 1, 1, tzinfo=UTC)
OUTCOME = RefreshOutcome("r1", True, GateDecision(True, (), {"map": 0.5}), HeadReport((), 100, 40), Start.FRESH)


class World:
    """What the loop sees: a clock, a count, and refreshes that succeed or fail."""

    def __init__(self) -> None:
        self.now = NOW
        self.count = 10
        self.last: LastRefresh | None = None
        self.error: Exception | None = None
        self.refreshes = 0
        self.stop = threading.Event()
        self.asked: tuple[RefreshAsked, ...] = ()
        self.elsewhere = False
        self.seconds = 0.0
        self.tidied = 0
        self.rolled_back_from: str | None = None
        self.loop = TrainerLoop(look=self.looked, last=lambda: self.last, refresh=self.refresh, now=lambda: self.now,
                                rule=RefreshRule(8, timedelta(hours=1)), stop=self.stop, poll_s=0.001, tidy=self.tidy,
                                clock=lambda: self.seconds)

    def looked(self) -> Observed:
        if isinstance(self.error, DatabaseUnavailable | OSError):
            raise self.error
        return Observed(self.count, asked=self.asked, rolled_back_from=self.rolled_back_from)

    def tidy(self) -> None:
        self.tidied += 1
        if self.error:
            raise self.error

    def refresh(self, now: datetime, last: LastRefresh | None) -> RefreshOutcome | None:
        if self.elsewhere:
            return None
        self.refreshes += 1
        if self.error:
            raise self.error
        self.last = LastRefresh(self.count, now)
        return OUTCOME


def test_a_refresh_runs_once_per_batch_of_rankings():
    world = World()
    assert world.loop.step() is OUTCOME and world.loop.step() is None
    world.count += 8
    assert world.loop.step() is OUTCOME
    assert world.refreshes == 2


def test_a_failed_refresh_is_not_repeated_at_once_but_after_the_interval():
    world = World()
    world.error = LabelsNotUsable("no validation rankings")
    assert world.loop.step() is None and world.loop.step() is None
    assert world.refreshes == 1
    world.now += timedelta(hours=1)
    world.error = None
    assert world.loop.step() is OUTCOME


def test_a_failed_refresh_is_repeated_when_there_is_more_to_learn_from():
    world = World()
    world.error = LabelsNotUsable("no validation rankings")
    world.loop.step()
    world.error = None
    world.count += 8
    assert world.loop.step() is OUTCOME


def test_a_lost_database_ends_nothing():
    world = World()
    world.error = DatabaseUnavailable("away")
    assert world.loop.step() is None
    world.error = None
    assert world.loop.step() is OUTCOME


def test_an_unexpected_error_of_a_refresh_counts_as_a_failed_refresh():
    world = World()
    world.error = RuntimeError("out of memory")
    assert world.loop.step() is None and world.refreshes == 1
    assert world.loop.pause_s == 0.002
    assert world.loop.step() is None and world.refreshes == 1
    assert world.loop.pause_s == 0.001
    world.now += timedelta(hours=1)
    world.error = None
    assert world.loop.step() is OUTCOME


def test_the_pause_grows_while_unexpected_errors_follow_each_other():
    world = World()
    world.error = OSError("disk full")
    pauses = []
    for _ in range(7):
        assert world.loop.step() is None
        pauses.append(round(world.loop.pause_s * 1000))
    assert pauses == [2, 4, 8, 16, 32, 32, 32]
    world.error = None
    assert world.loop.step() is OUTCOME and world.loop.pause_s == 0.001


def test_a_failure_after_the_candidate_was_recorded_is_tried_again_after_the_interval():
    world = World()
    world.error = LabelsNotUsable("could not be published")
    world.last = LastRefresh(0, NOW - timedelta(days=1))
    world.loop.step()
    world.last = LastRefresh(world.count, NOW)
    assert world.loop.step() is None and world.refreshes == 1
    world.now += timedelta(hours=1)
    world.loop.step()
    assert world.refreshes == 2


def test_an_operator_is_served_at_once_and_what_another_trainer_does_is_no_failure():
    world = World()
    world.last = LastRefresh(world.count, NOW)
    assert world.loop.step() is None
    world.asked = (RefreshAsked(uuid.UUID(int=1), "ann", "cats look wrong"),)
    world.elsewhere = True
    assert world.loop.step() is None and world.loop.pause_s == 0.001
    world.elsewhere = False
    assert world.loop.step() is OUTCOME


def test_a_stop_ends_the_loop():
    world = World()
    thread = threading.Thread(target=world.loop.run)
    thread.start()
    world.stop.set()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_what_waits_to_be_tidied_up_is_tried_again_now_and_then_while_nothing_is_due():
    world = World()
    assert world.loop.step() is OUTCOME and world.tidied == 0
    for world.seconds in (10.0, 31.0, 40.0, 62.0):
        assert world.loop.step() is None
    assert world.tidied == 2
    world.seconds, world.error = 100.0, RuntimeError("no such folder")
    assert world.loop.step() is None and world.tidied == 3 and world.loop.pause_s == 0.002


def test_a_rollback_holds_the_trainer_until_an_operator_asks():
    world = World()
    world.rolled_back_from = "r3"
    world.count += 100
    assert world.loop.step() is None and world.refreshes == 0
    world.asked = (RefreshAsked(uuid.UUID(int=1), "ann", "try again"),)
    assert world.loop.step() is OUTCOME
