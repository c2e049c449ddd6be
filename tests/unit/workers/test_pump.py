"""The pump takes what waits until nothing does, survives errors, and takes turns with doorbells."""

from __future__ import annotations

import threading

import pytest

from byline.errors import DatabaseUnavailable
from services.workers import pump as module
from services.workers.pump import LookupPump, Turns


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.01)
    monkeypatch.setattr(module, "POLL_S", 5.0)


def run(step, wait_for: threading.Event, turn: threading.Lock | None = None) -> LookupPump:
    stop = threading.Event()
    pump = LookupPump(step, turn or threading.Lock(), stop)
    pump.start()
    assert wait_for.wait(10)
    stop.set()
    pump.join(10)
    return pump


def test_it_steps_until_nothing_waits() -> None:
    left, done = [3, 2, 1, 0], threading.Event()

    def step() -> int:
        found = left.pop(0) if left else 0
        if not found:
            done.set()
        return found

    run(step, done)
    assert left == []


@pytest.mark.parametrize("error", [DatabaseUnavailable("away"), RuntimeError("no tables yet")])
def test_an_error_is_tried_again(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.01)
    outcomes, done = [error, 0], threading.Event()

    def step() -> int:
        outcome = outcomes.pop(0) if outcomes else 0
        if isinstance(outcome, Exception):
            raise outcome
        done.set()
        return outcome

    run(step, done)


def test_it_wakes_at_once_and_waits_for_its_turn() -> None:
    turn, steps, stop, woken = threading.Lock(), [], threading.Event(), threading.Event()

    def step() -> int:
        steps.append(turn.locked())
        if len(steps) == 2:
            woken.set()
        return 0

    pump = LookupPump(step, turn, stop)
    with turn:
        pump.start()
        pump.wake()
        assert not woken.wait(0.05) and steps == []
    while len(steps) < 1:
        threading.Event().wait(0.005)
    pump.wake()
    assert woken.wait(3)  # long before the poll
    stop.set()
    pump.join(10)
    assert all(steps)


def standing_in(turns: Turns, count: int) -> None:
    for _ in range(2000):
        if len(turns) == count:
            return
        threading.Event().wait(0.005)
    raise AssertionError(f"{len(turns)} in line instead of {count}")


def test_turns_are_given_in_the_order_they_were_asked_for() -> None:
    """A plain lock would be taken by the thread that is awake: a doorbell could wait for as long as there is work."""
    turns, order = Turns(), []

    def bell() -> None:
        with turns:
            order.append("bell")

    thread = threading.Thread(target=bell)
    with turns:
        thread.start()
        standing_in(turns, 2)
    with turns:  # asked for again at once, as the pump does
        order.append("pump")
    thread.join(10)
    assert order == ["bell", "pump"] and len(turns) == 0


def test_who_is_interrupted_while_waiting_leaves_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with turns:
        with monkeypatch.context() as patch:
            patch.setattr(turns._moved, "wait_for", interrupted)
            with pytest.raises(KeyboardInterrupt), turns:
                raise AssertionError("it is not its turn")
        assert len(turns) == 1
    with turns:
        assert len(turns) == 1
