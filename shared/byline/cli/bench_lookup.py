"""``make bench-lookup``: the whole fast tier over gRPC, at 120,000 × 768; JSON and figure in ``reports/bench``.

Why it exists: "milliseconds" is a claim about everything between a client's call and its answer, with the durable
writes, the queue and the wire in it. So real services on real servers are asked by 1, 8 and 64 clients and at a steady
rate, by embedding (the encoder excluded) and by image, and the answer's time is taken apart.

    python -m byline.cli.bench_lookup --against ../an-older-checkout

``--against`` runs the services of another checkout on the same release in the same run, turn by turn with this one's.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from byline.cli.bench_lookup_system import (
    MODEL_ID,
    BenchRelease,
    BenchSystem,
    Others,
    make_release,
    running,
    wait_for_quiet,
)
from byline.cli.bench_lookup_teacher import exact_cost
from byline.client import AsyncClient, Attribution
from byline.errors import BylineError
from byline.evaluation.bench_lookup import Asked, arrivals, breakdown, draw, parts_of, row_of, summary
from byline.evaluation.corpus_file import read_corpus
from byline.evaluation.result_file import git_commit, write_result

log = logging.getLogger("bench-lookup")
ROOT = Path(__file__).resolve().parents[3]

Ask = Callable[[AsyncClient, int], Awaitable[Attribution]]


@dataclass(frozen=True)
class Load:
    """One way of asking. ``clients`` is the most calls in flight; with ``rate`` they come at random moments."""

    name: str
    clients: int
    rate: float | None
    ask: Ask


def main(argv: Sequence[str] | None = None) -> None:
    """Build the release, run the systems, ask, and write the result."""
    a = _parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    begun = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="byline-bench-lookup-"))
    work.chmod(0o711)  # root's Postgres runs as nobody
    try:
        result = measure(a, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    path = a.out / "lookup.json"
    command = "make bench-lookup" if argv is None and len(sys.argv) == 1 else f"{sys.executable} -m {_module()}"
    write_result(path, result, command=command, seconds=time.monotonic() - begun, commit=git_commit(ROOT), seed=a.seed)
    drawn = draw(result, path.with_suffix(".png"))
    log.info("wrote %s%s", path, "" if drawn else "; no figure, as matplotlib is not installed")


def measure(a: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All rows, breakdowns and the speed-up."""
    corpus = read_corpus(a.corpus)
    chosen = [corpus[i] for i in np.random.default_rng(a.seed).permutation(len(corpus))[: a.base]]
    log.info("building a release of %d x %d", a.items, a.dim)
    release = make_release(
        a.releases or work / "releases", chosen, items=a.items, dim=a.dim, queries=a.queries, feature_spec=a.features,
        model_directory=a.model, index_factory=a.index, seed=a.seed,
    )  # fmt: skip
    runs: dict[str, list[dict[str, Any]]] = {}
    parts: dict[str, list[dict[str, float]]] = {}
    with ExitStack() as stack:
        variants = {"this checkout": None} if a.against is None else {"before": a.against, "this checkout": None}
        systems = {}
        for number, (name, checkout) in enumerate(variants.items()):
            log.info("starting the system: %s", name)
            systems[name] = stack.enter_context(
                running(work / f"system-{number}", release, feature_spec=a.features, model_directory=a.model,
                        checkout=checkout)
            )  # fmt: skip
            systems[name].withdraw([item.item_id for item in release.items[: a.withdrawn]])
        fsync = fsync_ms(work)
        ways = [(name, first) for name in systems for first in ((False, True) if a.first else (False,))]
        every = list(loads(a, release))
        for load, way in [(load, way) for _ in range(a.repeats) for load in every for way in ways]:
            run, known = _one_run(a, systems, load, *way)
            runs.setdefault(f"{load.name}\n{run['variant']}", []).append(run)
            parts.setdefault(f"{load.name}\n{run['variant']}", []).extend(known)
    target = (a.target_p50_ms, a.target_p99_ms)
    rows = [summary(found, target if found[0]["rate"] else None) for found in runs.values()]
    breakdowns = {name: breakdown(known) for name, known in parts.items()}
    ours = [row for row in rows if row["variant"] == "this checkout"]
    steady = next((row for row in ours if row["rate"] is not None), None)
    by_image, known = ([row for row in ours if row["name"] == f"{what}, 1 client"] for what in ("image", "known image"))
    return {
        "rows": rows,
        "breakdown_ms": breakdowns.get(f"{steady['name'] if steady else rows[0]['name']}\nthis checkout"),
        "breakdowns": breakdowns,
        "fdatasync_ms": fsync,
        "release": {"items": a.items, "dim": a.dim, "index": release.index_factory, "withdrawn": a.withdrawn,
                    "base_images": a.base, "corpus": "synthetic, see synthetic_features"},
        "target": None if steady is None else {
            "p50_ms": target[0], "p99_ms": target[1], "rate": steady["rate"], "runs": len(steady["runs"]),
            "runs_within": steady["runs_within_target"],
            "met_by_median": {
                row["variant"]: bool(row["p50_ms"] <= target[0] and row["p99_ms"] <= target[1])
                for row in rows if row["rate"] == steady["rate"]
            },
        },
        "speedup": _speedup(a, corpus, by_image[0], known[0]) if by_image and known else None,
    }  # fmt: skip


def _one_run(
    a: argparse.Namespace, systems: Mapping[str, BenchSystem], load: Load, name: str, first: bool
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """One load on one system: its figures with what else the machine did meanwhile, and the parts of each lookup."""
    system = systems[name]

    def own() -> float:
        return time.process_time() + sum(sum(one.cpu_seconds().values()) for one in systems.values())

    system.schedule(first=first)
    variant = f"{name}, scheduled first" if first else name
    wait_for_quiet(own, 0.0 if first else a.patience)
    used, clients, others = system.cpu_seconds(), time.process_time(), Others(own)
    found = asyncio.run(run(system, load, a.seconds, a.seed))
    beside = {"cores_used_by_others": others.cores(), "load_average": os.getloadavg()[0]}
    clients = time.process_time() - clients
    cpu = {part: after - used.get(part, 0.0) for part, after in system.cpu_seconds().items()} | {"clients": clients}
    row = {"variant": variant, "name": load.name} | row_of(found, clients=load.clients, rate=load.rate) | beside
    row["cpu_ms_per_job"] = {part: 1e3 * seconds / len(found) for part, seconds in cpu.items()}
    log.info("%s, %s: p50 %.1f ms, p99 %.1f ms, %.1f jobs/s, %d failed; others: %.2f cores", load.name, variant,
             row["p50_ms"], row["p99_ms"], row["jobs_per_s"], row["failed"], row["cores_used_by_others"])  # fmt: skip
    log.info("  processor milliseconds a job: %s", {part: round(ms, 2) for part, ms in row["cpu_ms_per_job"].items()})
    marks = system.marks([one.job_id for one in found])
    return row, [parts_of(one, marks[one.job_id]) for one in found if one.job_id in marks]


def loads(a: argparse.Namespace, release: BenchRelease) -> Iterator[Load]:
    """By embedding: the steady rate, then each number of clients; by image: new questions, then known ones."""
    made_by = f"models/{MODEL_ID}/releases/{release.release_id}"
    unseen = itertools.count()  # a picture asked before with the same prompt would be remembered

    async def by_embedding(client: AsyncClient, number: int) -> Attribution:
        return await client.attribute_embedding(
            release.embeddings[number % len(release.embeddings)].tolist(), made_by, top_k=a.top_k
        )

    async def by_image(client: AsyncClient, number: int) -> Attribution:
        picture = release.pictures[number % len(release.pictures)]
        return await client.attribute(picture.image, f"{picture.prompt} {next(unseen)}", top_k=a.top_k)

    async def by_known_image(client: AsyncClient, number: int) -> Attribution:
        picture = release.pictures[number % min(8, len(release.pictures))]
        return await client.attribute(picture.image, picture.prompt, top_k=a.top_k)

    for rate in a.rates:
        yield Load(f"embedding, {rate:g}/s", 256, rate, by_embedding)
    for clients in a.clients:
        yield Load(f"embedding, {clients} client{'s' * (clients > 1)}", clients, None, by_embedding)
    if a.images:
        yield Load("image, 1 client", 1, None, by_image)
        yield Load("image, 8 clients", 8, None, by_image)
        yield Load("known image, 1 client", 1, None, by_known_image)


async def run(system: BenchSystem, load: Load, seconds: float, seed: int) -> list[Asked]:
    """Ask for ``seconds`` after a short warm-up that is not counted."""
    async with AsyncClient(system.address, project="bench", model=MODEL_ID, timeout=60) as client:
        for number in range(10):
            await load.ask(client, number)
        if load.rate is not None:
            due = arrivals(load.rate, seconds, np.random.default_rng(seed))
            start = time.time() + 0.1
            gate = asyncio.Semaphore(load.clients)
            return list(await asyncio.gather(*(_one(client, load, n, gate, start + at) for n, at in enumerate(due))))
        ends = time.time() + seconds
        numbers = iter(range(10, 1 << 30))
        found: list[Asked] = []

        async def steadily() -> None:
            while time.time() < ends:
                found.append(await _one(client, load, next(numbers), None, None))

        await asyncio.gather(*(steadily() for _ in range(load.clients)))
        return found


async def _one(
    client: AsyncClient, load: Load, number: int, gate: asyncio.Semaphore | None, due: float | None
) -> Asked:
    if due is not None:
        await asyncio.sleep(max(0.0, due - time.time()))
    if gate is not None:
        await gate.acquire()
    begun = time.time()
    timings: Mapping[str, float] | None = None
    job_id = ""
    try:
        found = await load.ask(client, number)
        timings, job_id = found.answer.timings_ms, found.job.id
    except BylineError as error:
        log.warning("a lookup failed: %s: %s", error.reason, error.message)
    finally:
        if gate is not None:
            gate.release()
    return Asked(job_id, begun if due is None else due, begun, time.time(), timings)


def fsync_ms(folder: Path, writes: int = 100) -> float:
    """Median milliseconds of one durable 8 KiB write here: what a commit costs at the least."""
    path = folder / "fdatasync"
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)
    try:
        os.pwrite(descriptor, bytes(8192 * 16), 0)
        os.fdatasync(descriptor)
        taken = []
        for number in range(writes):
            os.pwrite(descriptor, os.urandom(8192), 8192 * (number % 16))
            begun = time.perf_counter()
            os.fdatasync(descriptor)
            taken.append(1e3 * (time.perf_counter() - begun))
    finally:
        os.close(descriptor)
        path.unlink()
    return float(np.median(taken))


def _speedup(
    a: argparse.Namespace, corpus: Sequence[Any], by_image: Mapping[str, Any], known: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Over the exact teacher and over the amortised first-order one, for the same queries, encoder included; and over
    the exact one where the picture's features are remembered."""
    if not a.teacher_items:
        return None
    log.info("the exact teacher on %d items", a.teacher_items)
    items, asked = corpus[: a.teacher_items], corpus[-a.teacher_queries :]
    cost = exact_cost(a.model, items, asked, a.seed, a.teacher_draws, len(corpus))
    lookup_s = by_image["p50_ms"] / 1e3
    amortised = amortised_seconds_per_item(a.out / "teacher.json")
    return {
        "lookup_s": lookup_s,
        "exact": cost,
        "over_exact": {str(n): cost["seconds_per_item"] * n / lookup_s for n in (len(corpus), a.items)},
        "over_exact_remembered": {
            str(n): cost["seconds_per_item"] * n / (known["p50_ms"] / 1e3) for n in (len(corpus), a.items)
        },
        "over_first_order": None if amortised is None else {
            str(n): amortised * n / lookup_s for n in (len(corpus), a.items)
        },
        "first_order_seconds_per_item_and_query": amortised,
    }  # fmt: skip


def amortised_seconds_per_item(path: Path) -> float | None:
    """What the first-order teacher costs a query and item when 200 queries share a pass, by ``make bench-teacher``."""
    if not path.is_file():
        return None
    rows = [row for row in json.loads(path.read_text())["rows"] if row["form"] == "first_order"]
    if not rows:
        return None
    most = max(rows, key=lambda row: (row["queries"], row["items"]))
    return float(most["seconds"]) / float(most["queries"]) / float(most["items"])


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=120_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--index", default=None, help="FAISS factory string; default: what the builder chooses")
    parser.add_argument("--withdrawn", type=int, default=100, help="items withdrawn before the first question")
    parser.add_argument("--base", type=int, default=128, help="real images whose features the corpus is drawn around")
    parser.add_argument("--queries", type=int, default=4096, help="different embeddings to ask")
    parser.add_argument("--top-k", type=int, default=20)
    parser.add_argument("--rates", type=float, nargs="*", default=[50.0], help="jobs per second, at random moments")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=15.0, help="of each load")
    parser.add_argument("--repeats", type=int, default=3, help="of all loads; the median and the best are shown")
    parser.add_argument("--patience", type=float, default=20.0, help="seconds to wait for a quiet machine before each")
    parser.add_argument("--target-p50-ms", type=float, default=15.0)
    parser.add_argument("--target-p99-ms", type=float, default=50.0)
    parser.add_argument("--first", action="store_true",
                        help="each load a second time with all that is measured scheduled before everything else (as "
                        "root): as near to a quiet machine as a busy one comes")
    parser.add_argument("--images", action=argparse.BooleanOptionalAction, default=True, help="ask by image as well")
    parser.add_argument("--teacher-items", type=int, default=32, help="items the exact teacher scores; 0: not asked")
    parser.add_argument("--teacher-queries", type=int, default=2)
    parser.add_argument("--teacher-draws", type=int, default=64)
    parser.add_argument("--features", default="efficientnet_lite0+minilm+denoiser")
    parser.add_argument("--corpus", type=Path, default=ROOT / "data/openclipart/items.parquet")
    parser.add_argument("--model", type=Path, default=ROOT / "data/generator")
    parser.add_argument("--against", type=Path, default=None, help="another checkout, measured in turn with this one")
    parser.add_argument("--releases", type=Path, default=None, help="keep the built release there for the next run")
    parser.add_argument("--out", type=Path, default=ROOT / "reports/bench")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def _module() -> str:
    return " ".join(["byline.cli.bench_lookup", *sys.argv[1:]])


if __name__ == "__main__":
    main()
