"""The curation loop goes on whatever one query does."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, cast

import structlog

from byline.errors import DatabaseUnavailable
from services.curation.loop import Curator, drift_part
from services.curation.plan import PlannedQuery
from services.curation.produce import Producer

PLAN = [PlannedQuery(f"thing {n}", n, n, split) for n, split in enumerate(["train", "test", "validation"])]


class Producing:
    """A producer that remembers, and fails with ``errors`` first."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.made: list[PlannedQuery] = []
        self.batches: list[list[str]] = []
        self.without_job: set[PlannedQuery] = set()

    def known(self) -> frozenset[tuple[str, int]]:
        return frozenset((p.prompt, p.seed) for p in self.made if p not in self.without_job)

    def failed(self) -> frozenset[tuple[str, int]]:
        return frozenset((p.prompt, p.seed) for p in self.without_job)

    def produce(self, batch: Sequence[PlannedQuery]) -> uuid.UUID:
        if self.errors:
            raise self.errors.pop(0)
        self.made += batch
        self.batches.append([planned.prompt for planned in batch])
        return uuid.uuid4()


class Stop(threading.Event):
    """Notes the pauses asked for instead of waiting; set after ``pauses`` of them."""

    def __init__(self, pauses: int) -> None:
        super().__init__()
        self.left = pauses
        self.waited: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waited.append(timeout)
        if len(self.waited) == self.left:
            self.set()
        return self.is_set()


def curator(producing: Producing, plan: Any = lambda: PLAN, max_rankings: int = 10, batch: int = 1) -> Curator:
    return Curator(
        cast(Producer, producing), plan, lambda: 0, lambda: 0, target_open=2, max_rankings=max_rankings, batch=batch
    )  # fmt: skip


def test_an_unexpected_error_ends_nothing_and_the_pause_grows() -> None:
    producing = Producing(RuntimeError("out of memory"), OSError("disk full"), RuntimeError("again"))
    stop = Stop(pauses=4)
    curator(producing).run(stop, poll_s=1.0)
    assert stop.waited == [2.0, 4.0, 8.0, 1.0]
    assert [p.prompt for p in producing.made] == ["thing 0", "thing 2"]


def test_a_lost_database_is_asked_again_at_the_poll_interval() -> None:
    producing = Producing(DatabaseUnavailable("away"), DatabaseUnavailable("away"))
    stop = Stop(pauses=3)
    curator(producing).run(stop, poll_s=1.0)
    assert stop.waited == [1.0, 1.0, 1.0]
    assert len(producing.made) == 2


def test_a_query_whose_job_ended_in_vain_comes_again() -> None:
    producing = Producing()
    loop = curator(producing)
    assert loop.tick() and loop.tick() and not loop.tick()
    producing.without_job.add(PLAN[0])
    assert loop.tick() and producing.made[-1] == PLAN[0]


def test_a_plan_without_live_groups_ends_the_tick() -> None:
    def all_test() -> Iterator[PlannedQuery]:
        yield from (PlannedQuery(f"thing {n}", n, n, "test") for n in range(10))

    assert not curator(Producing(), all_test).tick()


LONG_PLAN = [PlannedQuery(f"thing {n}", n, n, "train") for n in range(10)]


def test_a_job_has_as_many_queries_as_a_batch_holds_and_the_budget_allows() -> None:
    producing = Producing()
    assert curator(producing, lambda: LONG_PLAN, batch=4).tick()
    assert curator(producing, lambda: LONG_PLAN, batch=4, max_rankings=3).tick()
    assert producing.batches == [[f"thing {n}" for n in numbers] for numbers in (range(4), range(4, 7))]
    assert curator(producing, lambda: LONG_PLAN, batch=3, max_rankings=0).tick()  # 0: no limit


def test_a_query_whose_job_ended_in_vain_takes_no_other_query_with_it() -> None:
    producing = Producing()
    loop = curator(producing, lambda: LONG_PLAN, batch=3)
    loop.tick()
    producing.without_job |= {LONG_PLAN[0], LONG_PLAN[2]}
    for _ in range(2):
        loop.tick()
        producing.without_job.discard(LONG_PLAN[0] if len(producing.batches) == 2 else LONG_PLAN[2])
    loop.tick()
    assert producing.batches[1:] == [["thing 0"], ["thing 2"], ["thing 3", "thing 4", "thing 5"]]


def test_drift_samples_take_half_of_what_is_asked_for_and_leave_the_rest_to_the_plan() -> None:
    producing = Producing()
    waiting = [PlannedQuery(f"live {n}", n, 100 + n, "train", source="live") for n in range(100)]
    left = lambda most, known: [one for one in waiting if (one.prompt, one.seed) not in known][:most]  # noqa: E731
    loop = Curator(cast(Producer, producing), lambda: LONG_PLAN, lambda: 0, lambda: 0, target_open=2, max_rankings=100,
                   batch=4, samples=left)  # fmt: skip
    assert loop.tick() and loop.tick()
    assert producing.batches == [["live 0", "live 1", "thing 0", "thing 1"], ["live 2", "live 3", "thing 2", "thing 3"]]


def test_single_queries_are_samples_and_planned_ones_in_turn() -> None:
    assert [drift_part(1, asked) for asked in range(4)] == [0, 1, 0, 1]
    assert [drift_part(8, asked) for asked in (0, 1)] == [4, 4]
    assert sum(drift_part(5, asked) for asked in (6, 11)) == 5


def test_whoever_watches_is_told_that_the_limit_of_rankings_is_why_nothing_is_asked() -> None:
    producing, told, made = Producing(), list[bool](), [4]
    loop = Curator(cast(Producer, producing), lambda: LONG_PLAN, lambda: 0, lambda: made[0], target_open=2,
                   max_rankings=5, batch=4, full=told.append)  # fmt: skip
    assert loop.tick() and producing.batches == [["thing 0"]]
    made[0] = 5
    with structlog.testing.capture_logs() as lines:
        assert not loop.tick() and not loop.tick()
    assert told == [False, True, True]
    assert [line["event"] for line in lines] == ["curation_full"] and "MAX_RANKINGS" in lines[0]["why"]
