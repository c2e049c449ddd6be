"""Which releases' files go: never one that answers, is pinned, young, or one of the newest."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from byline.releases.garbage import KeepRule, plan_garbage
from byline.releases.garbage_files import BUILDING, REMOVING, abandoned, hold, remove_tree
from byline.releases.registry import ReleaseRecord, ReleaseState

NOW = datetime(2026, 2, 1, tzinfo=UTC)
RULE = KeepRule(newest=2, age=timedelta(days=7))


def record(number: int, state: ReleaseState = ReleaseState.RETIRED, **more: Any) -> ReleaseRecord:
    """Release ``rN``, made on the N-th of January."""
    values = {"manifest": None, "metrics": {}, "parent": None, "reason": None, **more}
    return ReleaseRecord(release_id=f"r{number}", model_id="m", state=state, directory=Path(f"r{number}"),
                         created_at=datetime(2026, 1, number, tzinfo=UTC), **values)  # type: ignore[arg-type]


def removed(records: list[ReleaseRecord], **more: Any) -> list[str]:
    options = {"answering": {}, "in_use": (), "now": NOW, "rule": RULE, **more}
    return sorted(plan_garbage(records, **options).remove)


def test_the_newest_that_can_answer_stay_and_older_ones_go() -> None:
    assert removed([record(n) for n in range(1, 6)]) == ["r1", "r2", "r3"]


def test_what_answers_and_what_a_rollback_brings_back_stays_however_old() -> None:
    records = [record(1, ReleaseState.ACTIVE), *(record(n) for n in range(2, 7))]
    plan = plan_garbage(records, {"r1": "active", "r2": "previous"}, (), NOW, RULE)
    assert sorted(plan.remove) == ["r3", "r4"]
    assert {kept.release_id: kept.why for kept in plan.keep}["r2"] == "previous"


def test_a_pinned_release_stays() -> None:
    assert removed([record(n) for n in range(1, 6)], in_use={"r1"}) == ["r2", "r3"]


def test_a_young_release_stays_and_a_refused_one_goes_when_it_is_old() -> None:
    refused = [record(1, ReleaseState.REJECTED), record(28, ReleaseState.REJECTED)]
    assert removed([*refused, record(2), record(3)]) == ["r1"]


def test_refused_candidates_do_not_push_out_those_that_can_answer() -> None:
    records = [record(1), record(2), *(record(n, ReleaseState.REJECTED) for n in range(3, 9))]
    assert removed(records) == [f"r{n}" for n in range(3, 9)]


def test_what_was_removed_is_not_removed_again() -> None:
    gone = record(1, collected_at=NOW)
    assert removed([gone, *(record(n) for n in range(2, 5))]) == ["r2"]


def test_a_folder_is_left_alone_while_its_builder_lives_and_while_it_is_young(tmp_path: Path) -> None:
    building, removing = tmp_path / f"{BUILDING}a", tmp_path / f"{REMOVING}b"
    building.mkdir()
    removing.mkdir()
    (building / "head.safetensors").write_bytes(b"1234")
    building.chmod(0o555)
    alive = hold(building)
    assert abandoned(tmp_path, young_s=0.0) == [removing]
    os.close(alive)
    assert abandoned(tmp_path, young_s=3600.0) == [removing]
    assert abandoned(tmp_path, young_s=0.0) == [building, removing]
    assert remove_tree(building) == 4 and not building.exists()
    assert remove_tree(building) == 0
