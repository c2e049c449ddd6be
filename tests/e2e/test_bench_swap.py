"""``make bench-swap`` in small: releases swapped under real lookups; none fails, none is mixed."""

from __future__ import annotations

import json
from pathlib import Path

import psutil

from byline.cli import bench_swap


def test_swaps_under_load_go_unnoticed(tmp_path: Path) -> None:
    bench_swap.main(
        ["--items", "300", "--dim", "32", "--base", "5", "--index", "SQ8,RFlat", "--features", "efficientnet_lite0",
         "--rate", "10", "--swaps", "4", "--warm", "0.5", "--quiet", "1.5", "--between", "0.3", "--patience", "0",
         "--out", str(tmp_path)]
    )  # fmt: skip
    result = json.loads((tmp_path / "swap.json").read_text())
    assert (result["failed"], result["mixed"], result["why"]) == (0, 0, [])
    assert result["swaps"] == 4 == len(result["swap_seconds"]) and len(result["releases_named"]) == 3
    assert result["p99_ratio"] > 0 and result["rollback_seconds"] < 30
    assert result["peak_memory_mb"] >= result["quiet_memory_mb"] > 0
    assert all(result["phases"][name]["jobs"] > 0 for name in ("before", "during", "after"))
    assert not [one for one in psutil.process_iter(["cmdline"]) if "byline-bench-swap" in str(one.info["cmdline"])]
