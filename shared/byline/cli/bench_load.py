"""``make bench-load``: how many lookups a second this machine sustains, and what happens at twice that.

Why it exists: a capacity is a rate at which the slowest hundredth of answers is still in time, not the rate at which
nothing has broken yet; and a service is judged by what it does beyond it. Real servers and services, asked by embedding
from several projects at random moments (open loop, waits counted from when a call was due). The rate climbs until p99
leaves the target; then twice the last good rate is offered, every refusal is looked at, and what was accepted is
followed to its end. ``reports/bench/load.json``.

    python -m byline.cli.bench_load --items 20000 --dim 256 --rates 25 50 100
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from byline.cli.bench_lookup_system import MODEL_ID, BenchRelease, BenchSystem, make_release, running
from byline.client import AsyncClient
from byline.errors import BylineError
from byline.evaluation.bench_lookup import arrivals
from byline.evaluation.corpus_file import read_corpus
from byline.evaluation.result_file import git_commit, write_result

log = logging.getLogger("bench-load")
ROOT = Path(__file__).resolve().parents[3]
PROJECTS = ("alpha", "beta", "gamma", "delta")


@dataclass(frozen=True)
class Called:
    """One call: milliseconds from when it was due; the reason it was refused for, and after what time to come back."""

    ms: float
    refused: str | None = None
    retry_after_s: float | None = None


def row_of(rate: float, seconds: float, calls: Sequence[Called]) -> dict[str, Any]:
    """Figures of one rate. Percentiles are those of answered calls; a refusal is not an answer."""
    answered = [call.ms for call in calls if call.refused is None]
    refused = [call for call in calls if call.refused is not None]
    p50, p90, p99 = np.percentile(answered, [50, 90, 99]).tolist() if answered else [None] * 3
    return {
        "offered_per_s": rate, "seconds": round(seconds, 2), "calls": len(calls), "answered": len(answered),
        "answered_per_s": round(len(answered) / seconds, 2), "p50_ms": p50, "p90_ms": p90, "p99_ms": p99,
        "refused": dict(Counter(str(call.refused) for call in refused)),
        "refused_saying_when": sum(call.retry_after_s is not None for call in refused),
    }  # fmt: skip


def sustained(rows: Sequence[Mapping[str, Any]], target_p99_ms: float) -> float | None:
    """The highest rate up to which every one answered all calls within the target; None if not even the first did."""
    best: float | None = None
    for row in sorted(rows, key=lambda row: row["offered_per_s"]):
        if row["refused"] or row["p99_ms"] is None or row["p99_ms"] > target_p99_ms:
            break
        best = float(row["offered_per_s"])
    return best


def main(argv: Sequence[str] | None = None) -> None:
    """Build, climb, overload, and write the result."""
    a = _parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    begun = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="byline-bench-load-"))
    work.chmod(0o711)  # root's Postgres runs as nobody
    try:
        result = measure(a, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    write_result(
        a.out / "load.json", result, command="make bench-load", seconds=time.monotonic() - begun,
        commit=git_commit(ROOT), seed=a.seed,
    )  # fmt: skip


def measure(a: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The climb, the overload, and the rate sustained once more after it."""
    corpus = read_corpus(a.corpus)
    chosen = [corpus[i] for i in np.random.default_rng(a.seed).permutation(len(corpus))[: a.base]]
    log.info("building a release of %d x %d", a.items, a.dim)
    release = make_release(
        work / "releases", chosen, items=a.items, dim=a.dim, queries=512, feature_spec=a.features,
        model_directory=a.model, index_factory=None, seed=a.seed,
    )  # fmt: skip
    os.environ["BYLINE_LOOKUP_QUEUE_BOUND"] = str(a.queue_bound)
    with running(work / "system", release, feature_spec=a.features, model_directory=a.model) as system:
        system.schedule(first=a.first)
        _offer(system, release, 20.0, 3.0, a.seed)  # warm
        climb: list[dict[str, Any]] = []
        for rate in a.rates:
            climb.append(_steadily(system, release, rate, a))
            if sustained(climb, a.target_p99_ms) != rate:
                break
        good = sustained(climb, a.target_p99_ms)
        twice = a.overload or (None if good is None else 2 * good)
        over = None if twice is None else _steadily(system, release, twice, a)
        before = time.monotonic()
        while system.count("end_time IS NULL"):
            time.sleep(0.05)
        drained = time.monotonic() - before
        after = None if good is None else _steadily(system, release, good, a)
        jobs, lost = system.count("true"), system.count("state <> 'SUCCEEDED'")
    return {
        "target_p99_ms": a.target_p99_ms, "queue_bound": a.queue_bound, "sustained_per_s": good, "climb": climb,
        "overload": over, "drained_s": round(drained, 2), "after": after, "jobs": jobs, "lost": lost,
        "load_average": os.getloadavg()[0], "scheduled_first": a.first,
        "release": {"items": a.items, "dim": a.dim, "index": release.index_factory},
    }  # fmt: skip


def _steadily(system: BenchSystem, release: BenchRelease, rate: float, a: argparse.Namespace) -> dict[str, Any]:
    row = _offer(system, release, rate, a.seconds, a.seed)
    log.info("%s/s: p50 %s ms, p99 %s ms, answered %s/s, refused %s", rate, row["p50_ms"], row["p99_ms"],
             row["answered_per_s"], row["refused"])  # fmt: skip
    return row


def _offer(system: BenchSystem, release: BenchRelease, rate: float, seconds: float, seed: int) -> dict[str, Any]:
    begun = time.monotonic()
    calls = asyncio.run(_calls(system, release, rate, seconds, seed))
    return row_of(rate, time.monotonic() - begun, calls)


async def _calls(
    system: BenchSystem, release: BenchRelease, rate: float, seconds: float, seed: int
) -> Sequence[Called]:
    due = arrivals(rate, seconds, np.random.default_rng(seed))
    made_by = f"models/{MODEL_ID}/releases/{release.release_id}"
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(AsyncClient(system.address, project=name, model=MODEL_ID, timeout=60))
            for name in PROJECTS
        ]
        start = time.monotonic() + 0.2

        async def one(number: int, at: float) -> Called:
            await asyncio.sleep(max(0.0, start + at - time.monotonic()))
            vector = release.embeddings[number % len(release.embeddings)].tolist()
            try:
                await clients[number % len(clients)].attribute_embedding(vector, made_by)
            except BylineError as error:
                return Called(1e3 * (time.monotonic() - start - at), error.reason, error.retry_after_s)
            return Called(1e3 * (time.monotonic() - start - at))

        return await asyncio.gather(*(one(number, at) for number, at in enumerate(due.tolist())))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--base", type=int, default=32, help="real images whose features the corpus is drawn around")
    parser.add_argument("--rates", type=float, nargs="+", default=[25, 50, 75, 100, 125, 150, 200, 250, 300, 400])
    parser.add_argument("--overload", type=float, default=None, help="offer this rate instead of twice the sustained")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each rate")
    parser.add_argument("--target-p99-ms", type=float, default=50.0)
    parser.add_argument("--queue-bound", type=int, default=600, help="lookups that may wait")
    parser.add_argument("--first", action="store_true", help="schedule all that is measured before everything else of "
                        "the machine (as root): as near to a quiet one as a busy one comes")
    parser.add_argument("--features", default="efficientnet_lite0")
    parser.add_argument("--corpus", type=Path, default=ROOT / "data/openclipart/items.parquet")
    parser.add_argument("--model", type=Path, default=ROOT / "data/generator")
    parser.add_argument("--out", type=Path, default=ROOT / "reports/bench")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
