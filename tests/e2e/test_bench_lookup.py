"""``make bench-lookup`` in small: real servers, services and clients; every figure of the result is there."""

from __future__ import annotations

import json
import math
from pathlib import Path

import psutil

from byline.cli import bench_lookup
from byline.evaluation.bench_lookup import PARTS


def test_the_whole_bench_on_a_small_release(tmp_path: Path) -> None:
    bench_lookup.main(
        ["--items", "300", "--dim", "32", "--base", "6", "--queries", "16", "--index", "SQ8,RFlat", "--withdrawn", "5",
         "--features", "efficientnet_lite0", "--seconds", "1", "--rates", "10", "--clients", "2", "--repeats", "2",
         "--patience", "0", "--teacher-items", "64", "--teacher-queries", "1", "--teacher-draws", "8",
         "--out", str(tmp_path)]
    )  # fmt: skip
    result = json.loads((tmp_path / "lookup.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [
        "embedding, 10/s", "embedding, 2 clients", "image, 1 client", "image, 8 clients", "known image, 1 client",
    ]  # fmt: skip
    for row in rows.values():
        assert len(row["runs"]) == 2 and row["failed"] == 0 and row["jobs"] > 0
        assert 0 < row["p50_ms"] <= row["p99_ms"] and row["jobs_per_s"] > 0
        assert {"gateway", "lookup", "postgres", "clients"} <= set(row["runs"][0]["cpu_ms_per_job"])
        assert row["best"]["cores_used_by_others"] >= 0 and row["best"]["load_average"] >= 0
    for parts in result["breakdowns"].values():
        assert set(parts) == set(PARTS) and not any(math.isnan(ms) for ms in parts.values())
    known, new = (result["breakdowns"][f"{name}, 1 client\nthis checkout"] for name in ("known image", "image"))
    assert known["encode"] < 0.2 * new["encode"]  # remembered, not encoded again
    assert result["target"]["runs"] == 2 and result["release"]["items"] == 300
    assert result["speedup"]["lookup_s"] == rows["image, 1 client"]["p50_ms"] / 1e3
    assert all(times > 0 for times in result["speedup"]["over_exact"].values())
    assert not [one for one in psutil.process_iter(["cmdline"]) if "byline-bench-lookup" in str(one.info["cmdline"])]
