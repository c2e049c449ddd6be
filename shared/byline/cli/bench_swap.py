"""``make bench-swap``: ten releases swapped under a steady load of lookups; JSON and figure in ``reports/bench``.

Why it exists: a swap must go unnoticed by those who ask meanwhile. Real servers, gateway, dispatcher and lookup worker
are asked 50 times a second over gRPC while an operator activates one release after another, each with another head and
so with other answers; every answer is compared with what its release says, offline.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from sqlalchemy import text

from byline.cli.bench_lookup_system import (
    MODEL_ID,
    BenchRelease,
    BenchSystem,
    Others,
    make_release,
    running,
    wait_for_quiet,
)
from byline.client import AsyncClient, Attribution
from byline.embedded.status import read_status
from byline.errors import BylineError, ServerNotStarted
from byline.evaluation.bench_lookup import Asked, Features, arrivals, parts_of
from byline.evaluation.bench_swap import Answered, Expected, SwapTime, draw, mixed_reason, summary
from byline.evaluation.corpus_file import read_corpus
from byline.evaluation.result_file import git_commit, write_result
from byline.releases.manifest import ReleaseManifest
from byline.releases.registry import ReleaseRegistry

log = logging.getLogger("bench-swap")
ROOT = Path(__file__).resolve().parents[3]
#: Three in turn: a worker keeps the active release and the one before, so each activation loads one anew.
RELEASES = 3
_SERVES = text("SELECT count(*) FROM worker_reports WHERE queue = 'lookup' AND release_id = :release")
_SWAP_S = 300.0


@dataclass(frozen=True)
class Made:
    """A release of the bench, and what it says of each picture."""

    release: BenchRelease
    answers: list[Expected]


@dataclass(frozen=True)
class Heard:
    """A lookup before it was looked at: of which picture, and the answer or the error."""

    place: int
    asked: Asked
    found: Attribution | None
    failed: str = ""


def main(argv: Sequence[str] | None = None) -> None:
    """Build the releases, run the system, ask and swap, write the result."""
    a = _parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    begun = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="byline-bench-swap-"))
    work.chmod(0o711)  # root's Postgres runs as nobody
    try:
        result, picture = measure(a, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    path = a.out / "swap.json"
    own = argv is None and len(sys.argv) == 1
    command = "make bench-swap" if own else " ".join(["python -m byline.cli.bench_swap", *(argv or sys.argv[1:])])
    write_result(path, result, command=command, seconds=time.monotonic() - begun, commit=git_commit(ROOT), seed=a.seed)
    drawn = picture(path.with_suffix(".png"))
    log.info("wrote %s%s", path, "" if drawn else "; no figure, as matplotlib is not installed")


def measure(a: argparse.Namespace, work: Path) -> tuple[dict[str, Any], Callable[[Path], bool]]:
    """The figures of one run, and how to draw them."""
    corpus = read_corpus(a.corpus)
    chosen = [corpus[i] for i in np.random.default_rng(a.seed).permutation(len(corpus))[: a.base]]
    folder = a.releases or work / "releases"
    made = []
    for number in range(RELEASES):
        log.info("building release %d of %d: %d x %d", number + 1, RELEASES, a.items, a.dim)
        release = make_release(
            folder, chosen, items=a.items, dim=a.dim, queries=64, feature_spec=a.features, model_directory=a.model,
            index_factory=a.index, seed=a.seed, mark=f"[{number}]", head_seed=a.seed + number,
        )  # fmt: skip
        made.append(Made(release, _expected(release, f"[{number}]", a)))
    log.info("starting the system")
    with running(work / "system", made[0].release, feature_spec=a.features, model_directory=a.model) as system:
        registry = ReleaseRegistry(system.engine)
        for one in made[1:]:
            registry.register(ReleaseManifest.read(one.release.directory), one.release.directory)

        def own() -> float:
            return time.process_time() + sum(system.cpu_seconds().values())

        wait_for_quiet(own, a.patience)
        # A million objects of the catalogues: looking through them for garbage stops the clients for half a second.
        gc.collect()
        gc.freeze()
        system.schedule(first=a.first)
        others = Others(own)
        with _Memory(system) as memory:
            heard, swaps = asyncio.run(_run(a, system, made))
        beside = {"cores_used_by_others": others.cores(), "load_average": os.getloadavg()[0]}
        system.schedule(first=False)
        answers = _judged(heard, made, system)
        rollback_s = _rollback(system, registry, made[(a.swaps - 1) % RELEASES].release.release_id)
    result = summary(answers, swaps, a.rate) | {
        "rollback_seconds": rollback_s, "peak_memory_mb": max((size for _, size in memory.seen), default=0.0),
        "quiet_memory_mb": float(np.median([size for at, size in memory.seen if at < swaps[0].begun] or [0.0])),
        "memory": "resident set of the lookup worker, mapped embeddings included", "scheduled_first": a.first, **beside,
        "release": {"items": a.items, "dim": a.dim, "index": made[0].release.index_factory, "features": a.features,
                    "bytes": sum(p.stat().st_size for p in made[0].release.directory.iterdir())},
    }  # fmt: skip
    for name in ("before", "during", "between", "after"):
        found = result["phases"][name]
        log.info("%s: %s", name, {key: value if value is None else round(value, 1) for key, value in found.items()})
    log.info("failed %d, mixed %d, p99 ratio %s, swaps of %s s, rollback %.2f s, memory %.0f -> %.0f MB",
             result["failed"], result["mixed"], result["p99_ratio"], [round(s.seconds, 1) for s in swaps], rollback_s,
             result["quiet_memory_mb"], result["peak_memory_mb"])  # fmt: skip
    return result, lambda path: draw(answers, swaps, memory.seen, path)


def _expected(release: BenchRelease, mark: str, a: argparse.Namespace) -> list[Expected]:
    """What the release says of each picture, found without any service."""
    from byline.catalog.decode import decode_image
    from byline.diffusion.model import DiffusionModel
    from byline.features import load_extractor
    from byline.features.registry import needs_model
    from byline.releases.loader import load_release

    model = DiffusionModel.load(a.model) if needs_model(a.features) else None
    extractor = load_extractor(a.features, model=model)
    opened = load_release(release.directory)
    found = []
    for picture in release.pictures:
        embedding = opened.embed(extractor.extract([decode_image(picture.image)], [picture.prompt]))[0]

        def scores(item_ids: Sequence[int], embedding: Features = embedding) -> Features:
            return opened.index.vectors(np.asarray(item_ids, dtype=np.int64)) @ embedding

        found.append(Expected(scores, mark))
    return found


async def _run(a: argparse.Namespace, system: BenchSystem, made: Sequence[Made]
               ) -> tuple[list[Heard], list[SwapTime]]:
    """Ask at the rate from beginning to end; swap in the middle."""
    async with AsyncClient(system.address, project="bench", model=MODEL_ID, timeout=60) as client:
        for number in range(len(made[0].release.pictures)):  # every picture is known from here on
            await _ask(a, client, made[0].release, number, time.time())
        swaps: list[SwapTime] = []
        ended = asyncio.Event()
        asking = asyncio.create_task(_keep_asking(a, client, made[0].release, ended))
        counted = time.time() + a.warm
        await asyncio.sleep(a.warm + a.quiet)
        for number in range(1, a.swaps + 1):
            release_id = made[number % len(made)].release.release_id
            begun = time.time()
            await client.activate(MODEL_ID, release_id, reason="bench-swap")
            await asyncio.to_thread(_until_served, system, release_id)
            swaps.append(SwapTime(release_id, begun, time.time()))
            await asyncio.sleep(a.between)
        await asyncio.sleep(a.quiet)
        ended.set()
        return [one for one in await asking if one.asked.due >= counted], swaps


async def _keep_asking(a: argparse.Namespace, client: AsyncClient, release: BenchRelease, ended: asyncio.Event
                       ) -> list[Heard]:
    """Poisson arrivals until told to end; each lookup on its own, however long the others take."""
    rng, start, number = np.random.default_rng(a.seed), time.time(), 0
    tasks: list[asyncio.Task[Heard]] = []
    at = start
    while not ended.is_set():
        for gap in np.diff(arrivals(a.rate, 1.0, rng), prepend=0.0):
            at += float(gap)
            await asyncio.sleep(max(0.0, at - time.time()))
            tasks.append(asyncio.create_task(_ask(a, client, release, number, at)))
            number += 1
    return list(await asyncio.gather(*tasks))


async def _ask(a: argparse.Namespace, client: AsyncClient, release: BenchRelease, number: int, due: float) -> Heard:
    place, begun = number % len(release.pictures), time.time()
    picture = release.pictures[place]
    try:
        found = await client.attribute(picture.image, picture.prompt, top_k=a.top_k)
    except BylineError as error:
        return Heard(place, Asked("", due, begun, time.time(), None), None, f"{error.reason}: {error.message}")
    return Heard(place, Asked(found.job.id, due, begun, time.time(), found.answer.timings_ms), found)


def _judged(heard: Sequence[Heard], made: Sequence[Made], system: BenchSystem) -> list[Answered]:
    """Compare each answer with what its release says, and take its time apart."""
    marks = system.marks([one.asked.job_id for one in heard if one.found is not None])
    answers = []
    for one in heard:
        if one.found is None:
            answers.append(Answered(one.asked.due, one.asked.ended, failed=one.failed))
            continue
        names = (one.found.answer.release, one.found.job.release)
        release, job_release = (name.rpartition("/")[2] for name in names)
        lines = [(line.item_id, line.cosine or 0.0, line.caption) for line in one.found.answer.influences]
        mixed = mixed_reason(release, job_release, lines, {m.release.release_id: m.answers[one.place] for m in made})
        known = marks.get(one.asked.job_id)
        late = {"late": 1e3 * (one.asked.begun - one.asked.due)}
        parts = {} if known is None else late | parts_of(one.asked, known)
        answers.append(Answered(one.asked.due, one.asked.ended, release, mixed=mixed, parts=parts))
    return answers


def _until_served(system: BenchSystem, release_id: str) -> None:
    ends, pause = time.monotonic() + _SWAP_S, threading.Event()
    while time.monotonic() < ends:
        with system.engine.connect() as connection:
            if connection.execute(_SERVES, {"release": release_id}).scalar_one():
                return
        pause.wait(0.05)
    raise ServerNotStarted(f"the lookup worker does not serve {release_id} after {_SWAP_S:.0f} s")


def _rollback(system: BenchSystem, registry: ReleaseRegistry, before: str) -> float:
    """Seconds from the call to the worker's answering from the release before."""
    begun = time.monotonic()
    active = registry.rollback(MODEL_ID, reason="bench-swap")
    _until_served(system, active.release_id)
    if active.release_id != before:
        raise ServerNotStarted(f"the rollback went to {active.release_id}, not to {before}")
    return time.monotonic() - begun


class _Memory:
    """Samples the lookup worker's memory on a thread of its own: (seconds, megabytes)."""

    def __init__(self, system: BenchSystem, every_s: float = 0.2) -> None:
        (self._pid,) = (line.pid for line in read_status(system.settings.state_dir) if line.name == "lookup")
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)
        self.seen: list[tuple[float, float]] = []

    def __enter__(self) -> _Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        parent = psutil.Process(self._pid)
        while not self._stop.wait(self._every_s):
            try:
                # The child that answers: the largest. Proportional sizes would take the lock its loading needs.
                size = max(one.memory_info().rss for one in (parent, *parent.children(recursive=True)))
            except psutil.NoSuchProcess:
                continue
            self.seen.append((time.time(), size / 1e6))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m byline.cli.bench_swap", description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=120_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--index", default=None, help="FAISS factory string; default: what the builder chooses")
    parser.add_argument("--base", type=int, default=64, help="real images the corpus is drawn around; all are asked")
    parser.add_argument("--rate", type=float, default=50.0, help="lookups per second, at random moments")
    parser.add_argument("--swaps", type=int, default=10)
    parser.add_argument("--quiet", type=float, default=30.0, help="seconds before the first swap and after the last")
    parser.add_argument("--warm", type=float, default=10.0, help="seconds of load before anything counts")
    parser.add_argument("--between", type=float, default=4.0, help="seconds between swaps")
    parser.add_argument("--top-k", type=int, default=20)
    parser.add_argument("--patience", type=float, default=30.0, help="seconds to wait for a quiet machine")
    parser.add_argument("--first", action="store_true",
                        help="everything measured is scheduled before all else on the machine (as root)")
    parser.add_argument("--features", default="efficientnet_lite0+minilm")
    parser.add_argument("--corpus", type=Path, default=ROOT / "data/openclipart/items.parquet")
    parser.add_argument("--model", type=Path, default=ROOT / "data/generator")
    parser.add_argument("--releases", type=Path, default=None, help="keep the built releases there for the next run")
    parser.add_argument("--out", type=Path, default=ROOT / "reports/bench")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
