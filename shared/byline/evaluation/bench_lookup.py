"""The arithmetic of ``make bench-lookup``: what a lookup took, where its milliseconds went, and the queries asked.

Why it exists: percentiles, parts and speed-ups are where a benchmark can flatter itself, so they are computed here from
plain values and tested on numbers made up; ``byline.cli.bench_lookup`` runs the system and the clients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.float32]

#: Where the time of a lookup goes, in its order. ``create``: client, wire, validation, the database transaction up to
#: the row's own time stamp. ``queue``: until the claim. ``decode`` … ``search``: the stage's own clock. ``worker``: the
#: rest between claim and completion. ``deliver``: writing the result durably, the notification, reading and sending it.
PARTS = ("create", "queue", "decode", "encode", "head", "search", "worker", "deliver")


@dataclass(frozen=True)
class Asked:
    """One lookup as its client saw it: seconds of the wall clock. ``due`` is when it should have begun (open loop)."""

    job_id: str
    due: float
    begun: float
    ended: float
    #: The stage's own timings, milliseconds; None of a lookup that did not succeed.
    timings_ms: Mapping[str, float] | None

    @property
    def latency_ms(self) -> float:
        """From when it was due: a client that had to wait for its turn did wait (no coordinated omission)."""
        return 1e3 * (self.ended - self.due)


@dataclass(frozen=True)
class Marks:
    """What the database says of the same job: seconds of the same wall clock."""

    created: float
    claimed: float
    completed: float


def row_of(asked: Sequence[Asked], *, clients: int, rate: float | None) -> dict[str, Any]:
    """One row of the result: ``rate`` jobs/s offered (None: every client asks again at once)."""
    answered = [one for one in asked if one.timings_ms is not None]
    latencies = [one.latency_ms for one in answered]
    spent = max(one.ended for one in asked) - min(one.due for one in asked)
    p50, p90, p99 = np.percentile(latencies, [50, 90, 99]).tolist() if latencies else [math.nan] * 3
    return {
        "clients": clients, "rate": rate, "jobs": len(asked), "failed": len(asked) - len(answered),
        "p50_ms": p50, "p90_ms": p90, "p99_ms": p99,
        "jobs_per_s": len(answered) / spent if spent > 0 else math.nan,
    }  # fmt: skip


def summary(runs: Sequence[Mapping[str, Any]], target: tuple[float, float] | None = None) -> dict[str, Any]:
    """The runs of one load as one row: the median of each figure, the best run (least p99), and all of them.

    A machine that others use too makes single runs lucky or unlucky, so neither stands alone. With ``target`` (p50,
    p99) in milliseconds it says of how many runs both were met.
    """
    best = min(runs, key=lambda run: (math.inf if math.isnan(run["p99_ms"]) else run["p99_ms"]))
    figures = ("p50_ms", "p90_ms", "p99_ms", "jobs_per_s")
    row = {
        **{name: runs[0][name] for name in ("variant", "name", "clients", "rate")},
        "failed": sum(run["failed"] for run in runs), "jobs": sum(run["jobs"] for run in runs),
        **{name: float(np.median([run[name] for run in runs])) for name in figures},
        "best": dict(best), "runs": [dict(run) for run in runs],
    }  # fmt: skip
    if target is not None:
        row["runs_within_target"] = sum(run["p50_ms"] <= target[0] and run["p99_ms"] <= target[1] for run in runs)
    return row


def parts_of(asked: Asked, marks: Marks) -> dict[str, float]:
    """Milliseconds of each of ``PARTS`` of one lookup; they add up to the time from ``begun`` to ``ended``."""
    own = {name: float(value) for name, value in (asked.timings_ms or {}).items() if name in PARTS}
    within = 1e3 * (marks.completed - marks.claimed)
    return {
        **dict.fromkeys(PARTS, 0.0), **own,
        "create": 1e3 * (marks.created - asked.begun),
        "queue": 1e3 * (marks.claimed - marks.created),
        "worker": within - sum(own.values()),
        "deliver": 1e3 * (asked.ended - marks.completed),
    }  # fmt: skip


def breakdown(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean milliseconds of each part (means add up, medians do not)."""
    return {name: float(np.mean([one[name] for one in parts])) if parts else math.nan for name in PARTS}


def synthetic_features(base: Features, count: int, rng: np.random.Generator, noise: float = 0.3) -> Features:
    """``count`` feature rows [count, d] near the rows of ``base`` [b, d]: a stand-in for a corpus of any size.

    Each is w·x + (1 − w)·y + noise·s·g: two different rows x, y of ``base``, w uniform in [½, 1], s the standard
    deviation of each column, g standard normal. So clusters, scales and correlations are those of real features; the
    finest structure (near duplicates) is not.
    """
    if len(base) < 2:
        raise ValueError("two rows at least are needed to draw more like them")
    spread = noise * base.std(axis=0)  # [d]
    out = np.empty((count, base.shape[1]), dtype=np.float32)
    for start in range(0, count, 8192):
        rows = min(8192, count - start)
        first = rng.integers(0, len(base), rows)
        second = (first + rng.integers(1, len(base), rows)) % len(base)
        weight = rng.uniform(0.5, 1.0, (rows, 1)).astype(np.float32)
        grain = rng.standard_normal((rows, base.shape[1]), dtype=np.float32) * spread
        out[start : start + rows] = weight * base[first] + (1 - weight) * base[second] + grain
    return out


def arrivals(rate: float, seconds: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """When jobs come at ``rate`` a second (Poisson): seconds from the beginning, ascending."""
    gaps = rng.exponential(1.0 / rate, max(1, round(rate * seconds)))
    due: NDArray[np.float64] = np.cumsum(gaps)
    return due


def draw(result: Mapping[str, Any], path: Path) -> bool:
    """The figure: latency by load, and where the time goes. False without matplotlib."""
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    variants = list(dict.fromkeys(row["variant"] for row in result["rows"]))
    for number, variant in enumerate(variants):
        rows = [row for row in result["rows"] if row["variant"] == variant]
        places = np.arange(len(rows)) + number * 0.8 / len(variants)
        left.bar(places, [row["p99_ms"] for row in rows], 0.7 / len(variants), alpha=0.4, label=f"{variant}: p99")
        left.bar(places, [row["p50_ms"] for row in rows], 0.7 / len(variants), label=f"{variant}: p50")
        if number == 0:
            left.set_xticks(places, [row["name"] for row in rows], rotation=20, ha="right", fontsize=8)
    left.set_yscale("log")
    left.set_ylabel("milliseconds, from due to answered")
    left.legend(fontsize=7)
    bottom = np.zeros(len(result["breakdowns"]))
    names = list(result["breakdowns"])
    for part in PARTS:
        heights = np.array([result["breakdowns"][name][part] for name in names])
        right.bar(names, heights, bottom=bottom, label=part)
        bottom += heights
    right.tick_params(axis="x", rotation=20, labelsize=7)
    right.set_ylabel("mean milliseconds of one lookup")
    right.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
