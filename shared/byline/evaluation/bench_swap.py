"""The arithmetic of ``make bench-swap``: which answers failed or were mixed, and what a swap does to latency.

Why it exists: "a swap goes unnoticed" is three figures (failed, mixed, latency while it happens), and each can be
flattered by what is counted as a swap. So the rules stand here, on plain values, and are tested on numbers made up;
``byline.cli.bench_swap`` runs the system.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: A swap's time counts on for so long (seconds) after the worker said that it was done.
AFTERMATH_S = 1.0


@dataclass(frozen=True)
class Expected:
    """What one release says of one picture: the score of any item, exactly, and the mark in all its captions.

    Which items an approximate index finds depends on how deep it looks; what it says of them does not.
    """

    scores: Callable[[Sequence[int]], NDArray[np.float32]]
    mark: str


@dataclass(frozen=True)
class Answered:
    """One lookup as its client saw it: seconds of one clock; ``due`` is when it should have begun (open loop).

    ``release`` is what the answer names; ``failed`` why there is none; ``mixed`` what of it is not that release's.
    """

    due: float
    ended: float
    release: str = ""
    failed: str = ""
    mixed: str = ""
    #: Milliseconds of each part (``byline.evaluation.bench_lookup.PARTS``), where they are known.
    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def latency_ms(self) -> float:
        """From when it was due: a client that had to wait for its turn did wait (no coordinated omission)."""
        return 1e3 * (self.ended - self.due)


@dataclass(frozen=True)
class SwapTime:
    """One activation: when it was called, and when the worker had swapped (seconds of the same clock)."""

    release: str
    begun: float
    done: float

    @property
    def seconds(self) -> float:
        """From the call to the fleet's answer."""
        return self.done - self.begun


def mixed_reason(release: str, job_release: str, found: Sequence[tuple[int, float, str]],
                 expected: Mapping[str, Expected], tolerance: float = 1e-3) -> str:
    """Why an answer does not come from one release from its first line to its last; empty if it does.

    ``found``: (item, score, caption) in order. ``expected`` by release: what each says of this picture.
    """
    if release != job_release:
        return f"the answer names {release}, its job {job_release}"
    wanted = expected.get(release)
    if wanted is None:
        return f"the answer names {release or 'no release'}, which was never active"
    if not found:
        return "the answer is empty"
    scores = wanted.scores([item for item, _, _ in found])
    if not np.allclose([score for _, score, _ in found], scores, rtol=tolerance, atol=tolerance):
        return f"the scores are not those of {release}"
    if any(wanted.mark not in caption for _, _, caption in found):
        return f"a caption is not that of {release}"
    return ""


def summary(answers: Sequence[Answered], swaps: Sequence[SwapTime], rate: float) -> dict[str, Any]:
    """The figures of one run. ``p99_ratio``: during the swaps, against the quiet time before and after all of them."""
    first, last = min(swap.begun for swap in swaps), max(swap.done for swap in swaps) + AFTERMATH_S
    phases = {
        "before": [one for one in answers if one.due < first],
        "during": [one for one in answers if any(s.begun <= one.due < s.done + AFTERMATH_S for s in swaps)],
        "between": [one for one in answers if first <= one.due < last
                    and not any(s.begun <= one.due < s.done + AFTERMATH_S for s in swaps)],
        "after": [one for one in answers if one.due >= last],
    }  # fmt: skip
    quiet = row(phases["before"] + phases["after"])
    rows = {name: row(found) for name, found in phases.items()} | {"quiet": quiet}
    return {
        "rate": rate, "swaps": len(swaps), "jobs": len(answers), "failed": sum(bool(one.failed) for one in answers),
        "mixed": sum(bool(one.mixed) for one in answers),
        "why": sorted({one.failed or one.mixed for one in answers} - {""})[:20],
        "p99_ratio": _ratio(rows["during"]["p99_ms"], quiet["p99_ms"]),
        "p50_ratio": _ratio(rows["during"]["p50_ms"], quiet["p50_ms"]),
        "phases": rows,
        "slowest_during": [
            {"latency_ms": one.latency_ms, "parts_ms": dict(one.parts)}
            for one in sorted(phases["during"], key=lambda one: -one.latency_ms)[:10]
        ],
        "swap_seconds": [swap.seconds for swap in swaps],
        "releases_named": sorted({one.release for one in answers} - {""}),
    }  # fmt: skip


def _ratio(during: float | None, quiet: float | None) -> float | None:
    return during / quiet if during is not None and quiet else None


def row(answers: Sequence[Answered]) -> dict[str, Any]:
    """Percentiles of the answered lookups of one phase; None where there is none."""
    latencies = [one.latency_ms for one in answers if not one.failed]
    p50, p90, p99, worst = np.percentile(latencies, [50, 90, 99, 100]).tolist() if latencies else [None] * 4
    return {"jobs": len(answers), "p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "worst_ms": worst}


def draw(answers: Sequence[Answered], swaps: Sequence[SwapTime], memory: Sequence[tuple[float, float]], path: Path
         ) -> bool:
    """Latency of each lookup and the worker's memory over time, swaps shaded. False without matplotlib.

    ``memory``: (seconds, megabytes).
    """
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    start = min(one.due for one in answers)
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(11, 5.5), sharex=True, height_ratios=(2, 1))
    above.scatter([one.due - start for one in answers], [one.latency_ms for one in answers], s=3, alpha=0.5)
    above.set_yscale("log")
    above.set_ylabel("milliseconds, due to answered")
    below.plot([at - start for at, _ in memory], [size for _, size in memory])
    below.set_ylabel("lookup worker, MB")
    below.set_ylim(bottom=0)
    below.set_xlabel("seconds; shaded: from an activation until the worker serves the release")
    for axes in (above, below):
        for swap in swaps:
            axes.axvspan(swap.begun - start, swap.done - start, color="tab:orange", alpha=0.3, linewidth=0)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
