"""The consumption canary: a worker that consumes nothing is found out, and no other."""

from __future__ import annotations

import threading

from byline.errors import BrokerUnavailable
from services.workers.canary import Canary

EVERY_S = 10.0


class Worker:
    """A worker whose clock a test sets, and whose Redis it can take away."""

    def __init__(self) -> None:
        self.now = 100.0
        self.sent = 0
        self.redis_is_away = False
        self.deaf = False
        self.canary = Canary(self._send, self._found, lambda: self.now, EVERY_S)

    def _send(self) -> None:
        if self.redis_is_away:
            raise BrokerUnavailable("away")
        self.sent += 1

    def _found(self) -> None:
        self.deaf = True

    def pass_time(self, seconds: float, *, consumes: bool) -> bool:
        """Second by second; returns whether the worker was found deaf."""
        for _ in range(round(seconds)):
            before = self.sent
            if self.canary.step():
                return True
            if consumes and self.sent > before:
                self.canary.came_back()
            self.now += 1.0
        return False


def test_an_idle_worker_that_consumes_is_never_deaf_and_sends_at_its_pace() -> None:
    worker = Worker()
    assert not worker.pass_time(101, consumes=True)
    assert worker.sent == 11


def test_a_worker_that_consumes_nothing_is_found_out_within_three_periods() -> None:
    worker = Worker()
    worker.pass_time(50, consumes=True)
    begun = worker.now
    assert worker.pass_time(1000, consumes=False)
    assert worker.now - begun <= 3 * EVERY_S


def test_one_lost_canary_is_forgiven() -> None:
    worker = Worker()
    worker.pass_time(EVERY_S, consumes=False)  # Redis was wiped with the canary in it
    assert not worker.pass_time(300, consumes=True)


def test_a_worker_that_works_for_hours_is_not_deaf() -> None:
    worker = Worker()
    worker.pass_time(3, consumes=False)
    with worker.canary.working():
        assert not worker.pass_time(7200, consumes=False)
    assert not worker.pass_time(EVERY_S - 2, consumes=False), "the canary behind the work has had no time yet"
    worker.canary.came_back()
    assert not worker.pass_time(300, consumes=True)


def test_nothing_is_judged_while_redis_is_away() -> None:
    worker = Worker()
    worker.redis_is_away = True
    assert not worker.pass_time(1000, consumes=False)
    worker.redis_is_away = False
    assert not worker.pass_time(300, consumes=True)


def test_the_loop_ends_the_worker_once_and_stops() -> None:
    sent, found = [], []
    canary = Canary(lambda: sent.append(1), lambda: found.append(1), iter(range(0, 10_000, 5)).__next__, 4.0)
    stop = threading.Event()
    thread = threading.Thread(target=canary.run, args=(_Hasty(stop),))
    thread.start()
    thread.join(30)
    assert not thread.is_alive() and found == [1] and len(sent) == 2


class _Hasty(threading.Event):
    """An event whose waits take no time."""

    def __init__(self, stop: threading.Event) -> None:
        super().__init__()
        self._stop = stop

    def wait(self, timeout: float | None = None) -> bool:
        return self._stop.is_set()
