"""``make bench-swap`` in small: releases swapped under real lookups; none fails, none is mixed, and the figures are
those of the answers and of the database."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from sqlalchemy import text

from byline.cli import bench_swap
from byline.evaluation.bench_swap import AFTERMATH_S, SwapTime

SWAPS = 4
#: What was done, in the transaction that did it; what was asked for is recorded by the gateway, as models/….
_ACTIVATED = text(
    "SELECT resource FROM audit_events WHERE action = 'ActivateRelease' AND resource LIKE 'releases/%' ORDER BY id"
)
_ANSWERED = text("SELECT release_id, count(*) FROM jobs WHERE state = 'SUCCEEDED' GROUP BY 1")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the bench made its figures from: the answers as they came, the times of the swaps, the database's rows."""
    found: dict[str, Any] = {}
    judged, summary = bench_swap._judged, bench_swap.summary

    def with_rows(heard: Sequence[bench_swap.Heard], made: Any, system: Any) -> Any:
        found["heard"] = heard
        with system.engine.connect() as connection:
            _to_begin_with, *found["activated"] = connection.execute(_ACTIVATED).scalars()
            found["answered"] = {row[0]: row[1] for row in connection.execute(_ANSWERED)}
        return judged(heard, made, system)

    def with_swaps(answers: Any, swaps: Sequence[SwapTime], rate: float) -> Any:
        found["swaps"] = swaps
        return summary(answers, swaps, rate)

    monkeypatch.setattr(bench_swap, "_judged", with_rows)
    monkeypatch.setattr(bench_swap, "summary", with_swaps)
    return found


def p99(heard: Sequence[bench_swap.Heard]) -> float:
    return float(np.percentile([1e3 * (one.asked.ended - one.asked.due) for one in heard], 99))


def is_mixed(one: bench_swap.Heard) -> bool:
    """By the names alone: release number n marks its captions with [n]."""
    assert one.found is not None
    names = {one.found.answer.release, one.found.job.release}
    marks = {line.caption[-3:] for line in one.found.answer.influences}
    return len(names) != 1 or marks != {f"[{names.pop()[-1]}]"}


def test_swaps_under_load_go_unnoticed(tmp_path: Path, seen: dict[str, Any]) -> None:
    bench_swap.main(
        ["--items", "300", "--dim", "32", "--base", "5", "--index", "SQ8,RFlat", "--features", "efficientnet_lite0",
         "--rate", "10", "--swaps", str(SWAPS), "--warm", "0.5", "--quiet", "1.5", "--between", "0.3",
         "--patience", "0", "--out", str(tmp_path)]
    )  # fmt: skip
    result = json.loads((tmp_path / "swap.json").read_text())
    assert (result["failed"], result["mixed"], result["why"]) == (0, 0, [])
    heard = seen["heard"]
    assert len(heard) == result["jobs"] and not [one for one in heard if one.found is None or is_mixed(one)]

    assert result["swaps"] == SWAPS == len(result["swap_seconds"]) == len(seen["activated"])
    activated = [name.rpartition("/")[2] for name in seen["activated"]]
    assert activated == [swap.release for swap in seen["swaps"]] and len(set(activated)) == 3
    assert set(result["releases_named"]) <= set(seen["answered"]) and len(result["releases_named"]) >= 2
    assert sum(seen["answered"].values()) >= len(heard)

    swaps = seen["swaps"]
    first, last = swaps[0].begun, swaps[-1].done + AFTERMATH_S
    during = [one for one in heard if any(s.begun <= one.asked.due < s.done + AFTERMATH_S for s in swaps)]
    quiet = [one for one in heard if one.asked.due < first or one.asked.due >= last]
    assert result["p99_ratio"] == pytest.approx(p99(during) / p99(quiet))
    assert (len(during), len(quiet)) == (result["phases"]["during"]["jobs"], result["phases"]["quiet"]["jobs"])
    assert all(result["phases"][name]["jobs"] > 0 for name in ("before", "during", "after"))

    assert result["rollback_seconds"] < 30
    assert 100 < result["quiet_memory_mb"] <= result["peak_memory_mb"] < 10_000  # a process with torch, and one alone
    assert not [one for one in psutil.process_iter(["cmdline"]) if "byline-bench-swap" in str(one.info["cmdline"])]
