"""The system that ``make bench-lookup`` measures: real servers and services on a corpus of any size.

Why it exists: an end-to-end figure is one only if nothing on the path is left out. Postgres (its settings for safety
untouched), the Redis-protocol server, gateway, dispatcher and lookup worker are started as ``byline up`` starts them;
only the corpus' contents are synthetic.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import psycopg
from PIL import Image
from sqlalchemy import Engine, text

from byline.catalog.items import Item
from byline.catalog.store import CatalogStore, ModelRecord
from byline.config import Settings, load_settings
from byline.db import make_engine
from byline.embedded.control import bring_down, bring_up
from byline.embedded.status import read_status
from byline.errors import ServerNotStarted
from byline.evaluation.bench_lookup import Features, Marks, synthetic_features
from byline.releases.manifest import CATALOGUE, HEAD, ReleaseManifest
from byline.releases.registry import ReleaseRegistry
from byline.teachers.ranking import TeacherItem

MODEL_ID = CORPUS_ID = "bench"
SERVICES = ("gateway", "dispatcher", "lookup")
_READY_S = 180.0


@dataclass(frozen=True)
class Picture:
    """A query as a client sends it."""

    image: bytes
    prompt: str


@dataclass(frozen=True)
class BenchRelease:
    """A built release, its catalogue, and what is asked of it."""

    directory: Path
    release_id: str
    items: Sequence[Item]
    #: Query embeddings [q, d] of its own head.
    embeddings: Features
    pictures: Sequence[Picture]
    index_factory: str


def make_release(
    folder: Path, corpus: Sequence[TeacherItem], *, items: int, dim: int, queries: int, feature_spec: str,
    model_directory: Path, index_factory: str | None, seed: int, device: str = "cpu", mark: str = "",
    head_seed: int | None = None,
) -> BenchRelease:  # fmt: skip
    """Build a release of ``items`` synthetic items under ``folder`` with the builder every release is built with.

    ``corpus``: real images; their features are the base of all others (``synthetic_features``), and their pictures are
    the queries that are asked by image. The head is not trained: it projects standardised features to ``dim``.
    ``mark`` ends the release's name and every caption, ``head_seed`` makes another head of the same corpus.
    """
    import torch

    from byline.diffusion.model import DiffusionModel
    from byline.features import load_extractor
    from byline.features.registry import needs_model
    from byline.ranker.head import Head, HeadConfig, feature_blocks, load_head
    from byline.releases.builder import build_release
    from byline.releases.catalogue import read_catalogue

    rng = np.random.default_rng(seed)
    model = DiffusionModel.load(model_directory, device) if needs_model(feature_spec) else None
    extractor = load_extractor(feature_spec, device=device, model=model)
    base = np.concatenate([extractor.extract([one.image], [one.caption]) for one in corpus])  # [b, d_in]
    asked = synthetic_features(base, queries, np.random.default_rng([seed, 1]))
    release_id = f"bench-{items}x{dim}-{(index_factory or 'default').replace(',', '-')}{mark.strip('[]')}"
    directory = folder / release_id
    if directory.exists():  # kept by an earlier run
        head, catalogue = load_head(directory / HEAD), list(read_catalogue(directory / CATALOGUE).values())
    else:
        features = synthetic_features(base, items, rng)
        blocks = feature_blocks(extractor.spec.encoders, extractor.dims)
        head = Head(HeadConfig(extractor.dim, blocks, (8,), dim, 0.0, item_prior=False))
        head.initialise(base, asked, torch.Generator().manual_seed(seed if head_seed is None else head_seed))
        ids = np.sort(rng.choice(1 << 40, items, replace=False))
        catalogue = [_item(int(item_id), number, corpus, mark) for number, item_id in enumerate(ids)]
        factory = {} if index_factory is None else {"index_factory": index_factory}
        build_release(
            folder, release_id=release_id, model_id=MODEL_ID, model_revision="bench", corpus_id=CORPUS_ID, head=head,
            feature_spec=extractor.spec.name, preprocessing_hash=extractor.preprocessing_hash, item_ids=ids,
            item_features=features, catalogue=catalogue, calibrator={}, metrics={}, parent=None,
            labels={"queries": 0, "digest": ""}, teacher_id="none", golden_features=asked[:4],
            created_at=datetime.now(UTC), **factory,  # type: ignore[arg-type]
        )  # fmt: skip
    return BenchRelease(
        directory, release_id, catalogue, head.embed_queries(asked),
        [Picture(_png(one.image), one.caption) for one in corpus], ReleaseManifest.read(directory).index_factory,
    )  # fmt: skip


def _schedule(thread: int, first: bool) -> None:
    """One thread. One that stands back behind its process' others goes on doing so: real-time threads that use up a
    whole core would be stopped by the kernel for a twentieth of each second, all of them."""
    back = os.getpriority(os.PRIO_PROCESS, thread)
    if back > 0 or os.sched_getscheduler(thread) == os.SCHED_BATCH:
        os.sched_setscheduler(thread, os.SCHED_BATCH if first else os.SCHED_OTHER, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, thread, -15 if first else 10)
    else:
        os.sched_setscheduler(thread, os.SCHED_RR if first else os.SCHED_OTHER, os.sched_param(1 if first else 0))


def _item(item_id: int, number: int, corpus: Sequence[TeacherItem], mark: str) -> Item:
    """An item with a caption and a creator of real length."""
    like = corpus[number % len(corpus)]
    caption = f"{like.caption} {mark}" if mark else like.caption
    return Item(item_id, caption, creator=f"creator {number % 1000}", licence="CC0", image_sha256="0" * 64)


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


class BenchSystem:
    """One running system that answers from a release; ``engine`` looks behind the API."""

    def __init__(self, settings: Settings, address: str, engine: Engine) -> None:
        self.settings = settings
        self.address = address
        self.engine = engine

    def marks(self, job_ids: Sequence[str]) -> dict[str, Marks]:
        """When each job was created, last claimed and completed, by the database."""
        rows = self._rows(
            """
            SELECT j.id::text, EXTRACT(epoch FROM j.create_time),
                EXTRACT(epoch FROM max(e.at) FILTER (WHERE e.to_state = 'RUNNING')),
                EXTRACT(epoch FROM max(e.at) FILTER (WHERE e.to_state = 'SUCCEEDED'))
            FROM jobs j JOIN job_events e ON e.job_id = j.id WHERE j.id = ANY(CAST(:ids AS uuid[])) GROUP BY j.id
            """,
            job_ids,
        )
        return {row[0]: Marks(float(row[1]), float(row[2]), float(row[3])) for row in rows if row[3] is not None}

    def cpu_seconds(self) -> dict[str, float]:
        """Processor seconds each program of this system has used so far, its children included."""
        return {process.name: _cpu_seconds(process.pid) for process in read_status(self.settings.state_dir)}

    def schedule(self, *, first: bool) -> None:
        """Run every thread of this system and of this process before all others of the machine (``SCHED_RR``), or as
        usual. PermissionError without the right to."""
        for process in (psutil.Process(), *map(psutil.Process, self._pids())):
            for one in (process, *process.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    for thread in one.threads():
                        with suppress(ProcessLookupError):
                            _schedule(thread.id, first)

    def _pids(self) -> list[int]:
        return [process.pid for process in read_status(self.settings.state_dir)]

    def withdraw(self, item_ids: Sequence[int]) -> None:
        """Withdraw items, as their creators would."""
        CatalogStore(self.engine).withdraw(item_ids)

    def count(self, condition: str) -> int:
        """How many jobs meet an SQL condition."""
        with self.engine.connect() as connection:
            return int(connection.execute(text(f"SELECT count(*) FROM jobs WHERE {condition}")).scalar_one())  # noqa: S608

    def _rows(self, statement: str, job_ids: Sequence[str]) -> list[tuple[Any, ...]]:
        with self.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(text(statement), {"ids": list(job_ids)})]


class Others:
    """How much of the machine others used, and the load average, between two moments: beside every figure."""

    def __init__(self, own: Callable[[], float]) -> None:
        """``own``: processor seconds used so far by everything that is measured."""
        self._own = own
        self._begun, self._used = time.monotonic(), _busy_s() - own()

    def cores(self) -> float:
        """Cores used by others since the beginning."""
        return max(0.0, (_busy_s() - self._own() - self._used) / (time.monotonic() - self._begun))


def wait_for_quiet(own: Callable[[], float], patience_s: float, at_most: float = 0.15) -> None:
    """Return when others used at most ``at_most`` of a core for 3 s, or when patience ends."""
    ends = time.monotonic() + patience_s
    while time.monotonic() < ends:
        others = Others(own)
        time.sleep(min(3.0, max(0.1, ends - time.monotonic())))
        if others.cores() <= at_most:
            return


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)
                 - getattr(times, "guest_nice", 0.0))  # fmt: skip


def _cpu_seconds(pid: int) -> float:
    total = 0.0
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                used = one.cpu_times()
                total += used.user + used.system
    return total


@contextmanager
def running(folder: Path, release: BenchRelease, *, feature_spec: str, model_directory: Path,
            checkout: Path | None = None) -> Iterator[BenchSystem]:  # fmt: skip
    """The system under ``folder``, answering from ``release``; with ``checkout``, its services are that tree's."""
    settings = load_settings(
        state_dir=folder, model_id=MODEL_ID, corpus_id=CORPUS_ID, feature_spec=feature_spec,
        model_directory=model_directory,
    )  # fmt: skip
    with _programs_of(checkout):
        servers = bring_up(settings, SERVICES)
    engine = make_engine(servers.database_url, 2, application="bench")
    try:
        _fill(engine, release, model_directory)
        _wait_for_release(engine, release.release_id)
        yield BenchSystem(settings, servers.grpc_address, engine)
    finally:
        engine.dispose()
        bring_down(settings)


@contextmanager
def _programs_of(checkout: Path | None) -> Iterator[None]:
    """Started programs import from ``checkout`` (None: as this one does)."""
    if checkout is None:
        yield
        return
    changed = {
        "PYTHONPATH": os.pathsep.join(str(checkout / part) for part in ("", "shared", "protos")),
        "PYTHONSAFEPATH": "1",  # the working directory is another checkout
    }
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _fill(engine: Engine, release: BenchRelease, model_directory: Path) -> None:
    """Corpus, model and items into Postgres, the release registered and active."""
    catalog = CatalogStore(engine)
    catalog.add_corpus(CORPUS_ID)
    catalog.add_model(ModelRecord(MODEL_ID, CORPUS_ID, model_directory, "bench"))
    url = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url) as connection, connection.cursor() as cursor:
        columns = "item_id, corpus_id, caption, creator, licence, image_sha256, near_duplicate_group"
        with cursor.copy(f"COPY items ({columns}) FROM STDIN") as copy:  # type: ignore[arg-type,unused-ignore]
            for item in release.items:
                copy.write_row((item.item_id, CORPUS_ID, item.caption, item.creator, item.licence,
                                item.image_sha256, item.near_duplicate_group))  # fmt: skip
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("ANALYZE items")
    registry = ReleaseRegistry(engine)
    registry.register(ReleaseManifest.read(release.directory), release.directory)
    registry.activate(MODEL_ID, release.release_id)


def _wait_for_release(engine: Engine, release_id: str) -> None:
    ends = time.monotonic() + _READY_S
    statement = text("SELECT count(*) FROM worker_reports WHERE queue = 'lookup' AND release_id = :release")
    while time.monotonic() < ends:
        with engine.connect() as connection:
            if connection.execute(statement, {"release": release_id}).scalar_one():
                return
        time.sleep(0.1)
    raise ServerNotStarted(f"the lookup worker does not serve {release_id} after {_READY_S:.0f} s")
