"""``byline demo``: the whole path on real images, from an empty state directory to a named source.

Why it exists: it is what a newcomer sees first, and the largest end-to-end check there is. Every
step goes through the system's own parts: private Postgres and Redis, the six services as processes,
jobs over gRPC, the curation service's rankings, the trainer's release, the workers' swap. Nothing
here computes an answer.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sqlalchemy import Engine

from byline.catalog.blobs import BlobStore
from byline.catalog.decode import encode_png
from byline.catalog.ingest import ingest
from byline.catalog.store import CatalogStore, ModelRecord
from byline.cli.demo_lookups import SteadyLookups
from byline.cli.demo_page import ShownQuery, render
from byline.cli.demo_strangers import short, shown_strangers, strangers, thumbnails
from byline.client import Client
from byline.config import Settings, load_settings, repository_root
from byline.db import make_engine
from byline.embedded.control import bring_down, bring_up
from byline.embedded.discovery import discover
from byline.errors import ServerNotStarted
from byline.evaluation.result_file import git_commit, machine, write_result
from byline.rankings.labelled import count_rankings
from byline.rankings.snapshot import SnapshotQuery, import_snapshot, read_header, read_snapshot, write_snapshot
from byline.releases.registry import ReleaseRecord, ReleaseRegistry

#: What the demo asks of the services, unless the caller's environment says otherwise: small live
#: rankings and prompt polling, so that a second release is there within the demo.
ENVIRONMENT = {
    "BYLINE_CURATION_CANDIDATES": "100",
    "BYLINE_CURATION_DRAWS": "24",
    "BYLINE_CURATION_BATCH": "2",
    "BYLINE_CURATION_TARGET_OPEN": "1",
    "BYLINE_TRAINER_POLL_SECONDS": "1",
    "BYLINE_TORCH_THREADS": "2",
}
VERIFIED_QUERIES = 2
#: The slow tiers, and what their progress counts.
SLOW = {"ESTIMATED": "draws of the query's gradient", "VERIFIED": "candidates scored by the teacher"}
#: Lookups that must name the new release before the swap counts as seen.
ANSWERS_AFTER_SWAP = 10
LIVE_RANKINGS = 2
#: Share of the snapshot's training rankings that release 1 is trained on; the rest comes with the
#: live ones, as a week's labels would.
FIRST_SHARE = 0.4

#: Prompts of the test split that are easy to judge by eye come first; any that is not in it is ignored.
EASY_TO_JUDGE = (
    "chicken burger (protein, food, menu)",
    "simple evergreen, with highlights (holiday, winter, tree, plant)",
    "magnifying glass (office, tools, tool)",
    "no u turn sign (roadsign, transportation)",
    "bison (animal)",
    "lemonade (food, beverage)",
)

#: Answers, or attributions, each with how long it took (fast ones in milliseconds, slow ones in seconds).
Answered = Sequence[tuple[Any, float]]

console = Console(stderr=True)


@dataclass(frozen=True)
class Prompt:
    """A held-out query: prompt, generated picture (PNG), and the seed it was generated from."""

    text: str
    seed: int
    image: bytes


@contextmanager
def step(title: str) -> Iterator[None]:
    """Announce a step, and say how long it took."""
    started = time.monotonic()
    console.print(f"[bold]{title}[/bold]")
    yield
    console.print(f"  [dim]{time.monotonic() - started:.1f} s[/dim]")


@contextmanager
def bar(label: str) -> Iterator[Any]:
    """A progress callback ``(done, total)`` shown as a bar."""
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as shown:
        task = shown.add_task(label, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def prepare_corpus(settings: Settings, engine: Engine) -> None:
    """Ingest the corpus and register the generator; both cost nothing the second time."""
    from byline.diffusion.model import directory_revision

    with bar("images") as progress:
        report = ingest(engine, BlobStore(settings.blob_dir), settings.corpus_source, settings.corpus_id, progress)
    console.print(f"  {report.added} images added, {report.unchanged} known, {len(report.skipped)} skipped")
    CatalogStore(engine).add_model(
        ModelRecord(
            settings.model_id,
            settings.corpus_id,
            settings.model_directory,
            directory_revision(settings.model_directory),
        )
    )


def add_labels(settings: Settings, engine: Engine, chosen: Sequence[SnapshotQuery]) -> None:
    """Import these rankings of the snapshot through the same door as ``byline labels import``."""
    header = read_header(settings.labels_dir)
    model = CatalogStore(engine).model(settings.model_id)
    with tempfile.TemporaryDirectory() as folder:
        write_snapshot(Path(folder), header, chosen)
        report = import_snapshot(
            engine, BlobStore(settings.blob_dir), Path(folder), model_id=model.model_id,
            model_revision=model.revision, corpus_id=model.corpus_id,
        )  # fmt: skip
    console.print(f"  {report.rankings} rankings added, {report.present} known")


def portions(queries: Sequence[SnapshotQuery]) -> tuple[list[SnapshotQuery], list[SnapshotQuery]]:
    """What release 1 learns from (with all validation and test queries), and what comes later."""
    train = [q for q in queries if q.split == "train"]
    first = round(FIRST_SHARE * len(train))
    return [q for q in queries if q.split != "train"] + train[:first], train[first:]


def wait_for_release(
    settings: Settings, registry: ReleaseRegistry, seen: Sequence[str], timeout_s: float
) -> ReleaseRecord | None:
    """The next candidate the trainer registers and decides on; None if it takes longer than that.

    Shows the trainer's own log lines meanwhile: the work happens there.
    """
    log = settings.state_dir / "logs" / "trainer.log"
    offset = log.stat().st_size if log.exists() else 0
    ends = time.monotonic() + timeout_s
    with console.status("  the trainer is at work") as status:
        while time.monotonic() < ends:
            for record in registry.list(settings.model_id):
                if record.release_id not in seen and record.state not in ("BUILT", "VALIDATED"):
                    return record
            if log.exists():
                with log.open("rb") as handle:
                    handle.seek(offset)
                    lines = [line for line in handle.read().decode(errors="replace").splitlines() if line.strip()]
                if lines:
                    status.update(f"  trainer: {lines[-1][:150]}")
            time.sleep(0.3)
    return None


def held_out_prompts(settings: Settings, queries: Sequence[SnapshotQuery], count: int) -> list[Prompt]:
    """Pictures the generator makes now, from prompts of the test split that no head has seen, new seeds."""
    from byline.diffusion.model import DiffusionModel

    model = DiffusionModel.load(settings.model_directory, settings.device)
    held_out = list(dict.fromkeys(q.prompt for q in queries if q.split == "test"))
    texts = list(dict.fromkeys([*(p for p in EASY_TO_JUDGE if p in held_out), *held_out]))[:count]
    seeds = [9_000_000 + n for n in range(len(texts))]
    with bar("pictures") as progress:
        pictures = model.generate(
            texts, seeds, steps=settings.curation_sampling_steps, guidance=settings.curation_guidance,
            progress=progress, batch=2,
        )  # fmt: skip
    return [
        Prompt(text, seed, encode_png(picture)) for text, seed, picture in zip(texts, seeds, pictures, strict=True)
    ]


def ask_fast(client: Client, prompts: Sequence[Prompt]) -> list[tuple[Any, float]]:
    """Attribution and end-to-end milliseconds of each prompt, after one warm-up call."""
    client.attribute(prompts[0].image, prompts[0].text)
    answers = []
    for prompt in prompts:
        started = time.monotonic()
        attribution = client.attribute(prompt.image, prompt.text, top_k=40)
        answers.append((attribution, 1e3 * (time.monotonic() - started)))
        verdict = ", NOT ATTRIBUTABLE" if attribution.not_attributable else ""
        release = attribution.release.rpartition("/")[2]
        table = Table(title=f"“{prompt.text}”: {answers[-1][1]:.0f} ms, {release}{verdict}")
        for name in ("rank", "score", "caption", "artist"):
            table.add_column(name)
        for one in attribution.influences[:5]:
            table.add_row(str(one.rank), f"{one.cosine or 0:.3f}", one.caption[:60], one.creator[:40])
        console.print(table)
    return answers


def ask_slow(client: Client, prompt: Prompt, tier: str) -> tuple[Any, float]:
    """The answer of a slow tier to a prompt and its seconds, with the worker's progress as a bar."""
    started = time.monotonic()
    job = client.submit(prompt.image, prompt.text, tier=tier, top_k=40)
    with bar(SLOW[tier]) as progress:
        for state in client.watch(job, timeout=600):
            job = state
            if job.stage in ("ESTIMATE", "VERIFY") and job.progress_total:
                progress(job.progress_done, job.progress_total)
    answer = job.answer_of(tier)
    if answer is None:
        raise ServerNotStarted(f"the answer {tier} to {prompt.text!r} ended {job.state}: {job.error}")
    return answer, time.monotonic() - started


def release_row(record: ReleaseRecord) -> dict[str, Any]:
    """What the page and result.json say of one release."""
    return {
        "name": record.release_id,
        "state": str(record.state),
        "labels": record.manifest.labels.queries,
        "map": record.metrics["map"]["head"],
        "map_standard_error": record.metrics["map"].get("head_standard_error"),
        "reason": record.reason,
    }


def refresh_under_load(
    settings: Settings, engine: Engine, client: Client, prompts: Sequence[Prompt], later: Sequence[SnapshotQuery],
    releases: list[ReleaseRecord],
) -> dict[str, Any]:  # fmt: skip
    """Let curation add rankings and the trainer refresh, while lookups keep flowing; what they saw."""
    registry = ReleaseRegistry(engine)
    seen = [record.release_id for record in registry.list(settings.model_id)]
    before = count_rankings(engine, settings.model_id, settings.curation_family)
    with SteadyLookups(settings.grpc_address, settings.model_id, [(p.image, p.text) for p in prompts]) as lookups:
        client.resume("rank")
        with bar("live rankings by curation") as progress:
            ends = time.monotonic() + 240
            while time.monotonic() < ends:
                fresh = count_rankings(engine, settings.model_id, settings.curation_family) - before
                progress(min(fresh, LIVE_RANKINGS), LIVE_RANKINGS)
                if fresh >= LIVE_RANKINGS:
                    break
                time.sleep(0.5)
        client.pause("rank")
        add_labels(settings, engine, later)
        record = wait_for_release(settings, registry, seen, timeout_s=300)
        if record is not None:
            console.print(f"  release {record.release_id}: {record.state}, {record.reason or 'passed the gate'}")
            if record.state == "ACTIVE":
                releases.append(record)
                if not lookups.wait_for_release(record.release_id, ANSWERS_AFTER_SWAP, timeout_s=60):
                    raise ServerNotStarted(f"release {record.release_id} is active, but lookups do not answer from it")
    return {"live_rankings": fresh, **lookups.summary()}


def demo(
    queries: Annotated[int, typer.Option(help="How many held-out prompts to generate and attribute.")] = 6,
    keep_up: Annotated[bool, typer.Option("--keep-up", help="Leave the services running afterwards.")] = False,
) -> None:
    """The whole path on real images; writes reports/demo/index.html and result.json."""
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    settings = load_settings()
    started = time.monotonic()
    found_running = discover(settings.state_dir) is not None
    if found_running:
        console.print("[yellow]Using the system that runs already, with its settings; it is left running.[/yellow]")
    with step("Starting Postgres, Redis and six services"):
        servers = bring_up(settings, report=lambda message: console.print(f"  {message}"))
    try:
        settings = load_settings()
        with Client(servers.grpc_address, settings.project_id, model=settings.model_id, timeout=30) as client:
            # Curation waits while answers are timed, and goes on when the demo lets it, or has ended.
            client.pause("rank")
            try:
                _run(settings, client, queries, started)
            finally:
                client.resume("rank")
    finally:
        if not keep_up and not found_running:
            bring_down(settings)
            console.print("[dim]Services stopped; their state is kept. `make up` starts them again.[/dim]")


def _run(settings: Settings, client: Client, count: int, started: float) -> None:
    engine = make_engine(settings.database_url, pool_size=4, application="byline-demo")
    registry = ReleaseRegistry(engine)
    with step("Ingesting the corpus"):
        prepare_corpus(settings, engine)
    snapshot = read_snapshot(settings.labels_dir)[1]
    first, later = portions(snapshot)
    releases = [r for r in reversed(registry.list(settings.model_id)) if r.state in ("ACTIVE", "RETIRED")]
    if not releases:
        with step("Importing labels; the trainer fits release 1"):
            add_labels(settings, engine, first)
            record = wait_for_release(settings, registry, [], timeout_s=420)
            if record is None or record.state != "ACTIVE":
                raise ServerNotStarted(f"the trainer published no release; see {settings.state_dir / 'logs'}")
            releases = [record]
            figures = record.metrics["map"]
            console.print(f"  {record.release_id}: mAP@{figures['L']} {figures['head']:.3f}, raw {figures['raw']}")
    with step("Generating pictures from held-out prompts"):
        prompts = held_out_prompts(settings, snapshot, count)
    with step("Fast answers (tier RETRIEVED)"):
        fast = ask_fast(client, prompts)
    with step("Pictures that are not this model's, or not of that prompt"):
        foreign = [Prompt(text, 0, image) for image, text in strangers([(p.image, p.text) for p in prompts])]
        refused = ask_fast(client, foreign)
    estimated: list[tuple[Any, float]] = []
    if releases[-1].manifest.sketches is not None:
        with step("Estimated answers (tier ESTIMATED): one gradient against sketches of the whole corpus"):
            estimated = [ask_slow(client, prompt, "ESTIMATED") for prompt in prompts[:VERIFIED_QUERIES]]
    slow: list[tuple[Any, float]] = []
    with step("Verified answers (tier VERIFIED): the exact teacher on the candidates"):
        slow = [ask_slow(client, prompt, "VERIFIED") for prompt in prompts[:VERIFIED_QUERIES]]
    swap: dict[str, Any] | None = None
    labelled = sum(q.split != "test" for q in snapshot)
    if count_rankings(engine, settings.model_id, settings.curation_family) < labelled:
        with step("Curation adds rankings, the trainer a release, and lookups go on"):
            swap = refresh_under_load(settings, engine, client, prompts, later, releases)
    _report(settings, client, engine, prompts, fast, foreign, refused, estimated, slow, swap, releases, started)


def _report(
    settings: Settings, client: Client, engine: Engine, prompts: Sequence[Prompt], fast: Answered,
    foreign: Sequence[Prompt], nulls: Answered, estimated: Answered, slow: Answered, swap: dict[str, Any] | None,
    releases: Sequence[ReleaseRecord], started: float,
) -> None:  # fmt: skip
    [corpus] = [c for c in CatalogStore(engine).corpora() if c.corpus_id == settings.corpus_id]
    retrieved = statistics.median(milliseconds for _, milliseconds in fast)
    verified = 1e3 * statistics.median(seconds for _, seconds in slow)
    latency = {"retrieved": retrieved, "verified": verified}
    if estimated:
        # The last one: the first also opens the release and loads the teacher.
        latency["estimated"] = 1e3 * estimated[-1][1]
    answered = len(fast) + len(nulls) + 2 + len(estimated) + len(slow) + (swap["lookups"] if swap else 0)
    failed = swap["failed"] if swap else 0
    candidates = max(1, len(slow[0][0].influences))
    latest = releases[-1]
    figures: dict[str, Any] = {
        "latency_ms": latency,
        "speedup": verified / retrieved,
        # Computed, not run: the seconds a candidate took, times the corpus. The fast answer ranks all of it.
        "speedup_over_whole_corpus": verified / candidates * corpus.items / retrieved,
        "verify": {
            "candidates": slow[0][0].withdrawn_influences + len(slow[0][0].influences),
            "draws": slow[0][0].draws,
        },
        "map": dict(latest.metrics["map"]),
        "releases": [release_row(ReleaseRegistry(engine).get(record.release_id)) for record in releases],
        "jobs": {"submitted": answered, "succeeded": answered - failed, "failed": failed},
        "corpus": {"items": corpus.items, "creators": corpus.creators},
        "not_attributable": {
            name: [sum(bool(attribution.not_attributable) for attribution, _ in found), len(found)]
            for name, found in (("queries", fast), ("strangers", nulls))
        },
        "calibration": latest.metrics.get("calibration"),
        "swap": swap or {"lookups": 0, "failed": 0, "mixed": 0, "live_rankings": 0},
    }
    folder = repository_root() / "reports" / "demo"
    seconds = time.monotonic() - started
    commit = git_commit(repository_root())
    write_result(folder / "result.json", figures, command="make demo", seconds=seconds, commit=commit, seed=0)
    shown = []
    for prompt, (attribution, milliseconds), estimate, verification in itertools.zip_longest(
        prompts, fast, estimated, slow
    ):
        answers = [attribution, *(found[0] for found in (estimate, verification) if found)]
        shown.append(
            ShownQuery(
                prompt=prompt.text, image=prompt.image, latency_ms=milliseconds,
                retrieved=short(attribution.answer),
                verified=verification[0] if verification else None,
                verified_seconds=verification[1] if verification else None,
                thumbnails=thumbnails(client, answers),
                estimated=estimate[0] if estimate else None,
                estimated_seconds=estimate[1] if estimate else None,
            )
        )  # fmt: skip
    others = shown_strangers(client, [(prompt.image, prompt.text) for prompt in foreign], nulls)
    header = {"command": "make demo", "seconds": seconds, "machine": machine(), "commit": commit[:12] or "none"}
    (folder / "index.html").write_text(render({**figures, **header}, shown, others))
    console.print(f"[bold]{folder / 'index.html'}[/bold]")
    between = f"estimated {latency['estimated'] / 1000:.1f} s, " if estimated else ""
    console.print(
        f"fast {retrieved:.0f} ms, {between}verified {verified / 1000:.1f} s ({verified / retrieved:,.0f}×); "
        f"mAP@{figures['map']['L']}: head {figures['map']['head']:.3f}, best raw "
        f"{max(figures['map']['raw'].values()):.3f}; {seconds:.0f} s in all"
    )
