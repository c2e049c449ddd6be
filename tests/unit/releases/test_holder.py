"""The holder: swaps under readers, keeps the old release when the new one is bad, disposes when nobody reads."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pytest

from byline.errors import DatabaseUnavailable, NoActiveRelease, ReleaseCorrupt
from byline.releases.holder import ReleaseHolder, Swap
from byline.releases.registry import ActiveRelease

NOW = datetime(2026, 11, 23, tzinfo=UTC)


@dataclass
class FakeRelease:
    """Two halves that must always be of the same release."""

    release_id: str
    head: str = field(default="")
    index: str = field(default="")

    def __post_init__(self) -> None:
        self.head = self.index = self.release_id


class Registry:
    """The active row, and loading that can fail."""

    def __init__(self) -> None:
        self.row: ActiveRelease | None = None
        self.broken: set[str] = set()
        self.down = False
        self.loads: list[str] = []

    def activate(self, release_id: str) -> None:
        self.row = ActiveRelease("m", release_id, None, (self.row.epoch if self.row else 0) + 1, NOW)

    def active(self) -> ActiveRelease | None:
        if self.down:
            raise DatabaseUnavailable("away")
        return self.row

    def load(self, release_id: str) -> FakeRelease:
        self.loads.append(release_id)
        if release_id in self.broken:
            raise ReleaseCorrupt(f"{release_id} is broken")
        return FakeRelease(release_id)


def make(registry: Registry, **callbacks: object) -> ReleaseHolder[FakeRelease]:
    return ReleaseHolder(registry.load, registry.active, now=lambda: NOW, **callbacks)  # type: ignore[arg-type]


def serving(holder: ReleaseHolder[FakeRelease]) -> str:
    with holder.current() as release:
        return release.release_id


def test_before_the_first_release_there_is_a_typed_error() -> None:
    registry = Registry()
    holder = make(registry)
    assert holder.refresh() is False
    with pytest.raises(NoActiveRelease), holder.current():
        pass
    assert holder.status.release_id is None


def test_a_reader_keeps_its_release_while_another_becomes_current() -> None:
    registry = Registry()
    swaps: list[Swap] = []
    holder = make(registry, on_swap=swaps.append)
    registry.activate("r1")
    assert holder.refresh()
    with holder.current() as held:
        registry.activate("r2")
        assert holder.refresh()
        assert serving(holder) == "r2"
        assert held.release_id == "r1"
    assert [(swap.release_id, swap.epoch) for swap in swaps] == [("r1", 1), ("r2", 2)]
    assert holder.refresh() is False


def test_swaps_under_concurrent_readers_give_no_mixed_and_no_failed_answer() -> None:
    registry = Registry()
    disposed: list[str] = []

    def dispose(release: FakeRelease) -> None:
        disposed.append(release.release_id)
        release.head = "gone"

    holder = make(registry, on_release=dispose)
    registry.activate("r0")
    holder.refresh()
    stop, mixed, answers = threading.Event(), [], [0] * 6

    def read(number: int) -> None:
        while not stop.is_set():
            with holder.current() as release:
                first = release.head
                second = release.index
                third = release.head
                if not first == second == third:
                    mixed.append((first, second, third))
            answers[number] += 1

    readers = [threading.Thread(target=read, args=(n,)) for n in range(6)]
    for reader in readers:
        reader.start()
    for number in range(1, 60):
        registry.activate(f"r{number}")
        assert holder.refresh()
    stop.set()
    for reader in readers:
        reader.join(10)
    assert not mixed
    assert all(answers)
    assert serving(holder) == "r59"
    assert sorted(disposed, key=lambda r: int(r[1:])) == [f"r{n}" for n in range(58)]


def test_a_release_that_cannot_be_loaded_leaves_the_old_one_serving_and_is_shown() -> None:
    registry = Registry()
    holder = make(registry)
    registry.activate("r1")
    holder.refresh()
    registry.broken.add("r2")
    registry.activate("r2")
    assert holder.refresh() is False
    assert serving(holder) == "r1"
    assert holder.status.error is not None
    assert "RELEASE_CORRUPT" in holder.status.error
    registry.broken.clear()
    assert holder.refresh() is True
    assert (serving(holder), holder.status.error) == ("r2", None)


def test_a_registry_that_is_away_changes_nothing() -> None:
    registry = Registry()
    holder = make(registry)
    registry.activate("r1")
    holder.refresh()
    registry.down = True
    assert holder.refresh() is False
    assert serving(holder) == "r1"
    registry.down = False
    holder.refresh()
    assert holder.status.error is None


def test_a_rollback_swaps_without_loading_again() -> None:
    registry = Registry()
    holder = make(registry)
    for release_id in ("r1", "r2", "r1"):
        registry.activate(release_id)
        assert holder.refresh()
    assert registry.loads == ["r1", "r2"]
    assert (holder.status.release_id, holder.status.epoch) == ("r1", 3)


def test_a_pinned_job_gets_its_own_release_held_or_loaded() -> None:
    registry = Registry()
    disposed: list[str] = []
    holder = make(registry, on_release=lambda release: disposed.append(release.release_id))
    for release_id in ("r1", "r2", "r3"):
        registry.activate(release_id)
        holder.refresh()
    assert disposed == ["r1"]
    for release_id in ("r3", "r2"):
        with holder.pinned(release_id) as release:
            assert release.release_id == release_id
    assert registry.loads == ["r1", "r2", "r3"]
    with holder.pinned("r1") as release:
        assert release.release_id == "r1"
    assert disposed == ["r1", "r1"]
    registry.broken.add("r1")
    with pytest.raises(ReleaseCorrupt), holder.pinned("r1"):
        pass


def test_the_last_reader_of_a_replaced_release_disposes_of_it() -> None:
    registry = Registry()
    disposed: list[str] = []
    holder = make(registry, on_release=lambda release: disposed.append(release.release_id))
    registry.activate("r1")
    holder.refresh()
    with holder.current(), holder.current():
        for release_id in ("r2", "r3"):
            registry.activate(release_id)
            holder.refresh()
        assert disposed == []
    assert disposed == ["r1"]


def test_what_is_being_loaded_is_shown_beside_what_answers() -> None:
    registry = Registry()
    seen: list[tuple[str | None, str | None, str | None]] = []

    def look() -> None:
        status = holder.status
        seen.append((status.release_id, status.loading, status.error))

    holder = make(registry, on_status=look)
    registry.activate("r1")
    holder.refresh()
    registry.activate("r2")
    registry.broken.add("r2")
    holder.refresh()
    assert seen == [(None, "r1", None), ("r1", "r2", None), ("r1", None, "RELEASE_CORRUPT: r2 is broken")]
    registry.broken.clear()
    holder.refresh()
    assert (holder.status.release_id, holder.status.loading, holder.status.error) == ("r2", None, None)
