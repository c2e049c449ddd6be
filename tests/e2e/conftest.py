"""A whole Byline of real processes on a tiny corpus and a tiny model, for tests that cross process borders.

Nothing is faked: Postgres and Valkey are servers of their own (so that a test may kill them), the generator is a
real diffusers pipeline with random weights, head, index and release come from the code that builds the real ones,
and every service is started by the command an operator uses.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from sqlalchemy import Engine, select, text

from byline.catalog.blobs import BlobStore
from byline.catalog.ingest import ingest
from byline.catalog.items import Item
from byline.catalog.store import CatalogStore, ModelRecord
from byline.client import Client
from byline.db import make_engine, migrate
from byline.db.models import WorkerReportRow
from byline.embedded.postgres import PrivatePostgres
from byline.embedded.process import ServerProcess, free_port, kill_tree
from byline.embedded.valkey import PrivateValkey
from byline.jobs.store import JobStore
from byline.releases.registry import ReleaseRegistry

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
CORPUS = ROOT / "data" / "openclipart" / "items.parquet"
ITEMS = 40
#: So many more, which only the second release holds, and so many of the first ones only the first release: an answer
#: that mixes the two is seen in its items.
APART = 4
MODEL_ID = "tiny"
CORPUS_ID = "tiny"
APART_CORPUS_ID = "tiny-apart"
#: One encoder: the worker loads in seconds. The demo runs the full specification.
FEATURES = "efficientnet_lite0"
LEASE_S = 5.0
#: How long a condition may take; a machine that shares its cores with a training needs more.
PATIENCE_S = float(os.environ.get("BYLINE_TEST_PATIENCE_S", "120"))

_REPORTS = WorkerReportRow.metadata.tables["worker_reports"]


def eventually(found: Callable[[], T | None], what: str, patience_s: float = PATIENCE_S) -> T:
    """``found()`` as soon as it is true. Fails naming ``what`` when it does not become so in time."""
    deadline = time.monotonic() + patience_s
    pause = threading.Event()
    while True:
        value = found()
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not happen within {patience_s:.0f} s")
        pause.wait(0.05)


@dataclass
class Cluster:
    """The processes, and what a test needs to look behind the API."""

    root: Path
    environment: Mapping[str, str]
    address: str
    engine: Engine
    postgres: PrivatePostgres
    valkey: PrivateValkey
    blobs: BlobStore
    releases: tuple[str, str]
    #: Where the lookup worker serves /metrics.
    metrics_port: int
    processes: dict[str, ServerProcess] = field(default_factory=dict)

    COMMANDS = {
        "gateway": ("services.gateway",),
        "dispatcher": ("services.dispatcher",),
        "lookup": ("services.workers", "lookup"),
        "verification": ("services.workers", "verification"),
    }

    @property
    def jobs(self) -> JobStore:
        """The job store, to see what no client sees."""
        return JobStore(self.engine, {})

    @property
    def registry(self) -> ReleaseRegistry:
        """The release registry."""
        return ReleaseRegistry(self.engine)

    def client(self, project: str = "e2e") -> Client:
        """A client of the gateway."""
        return Client(self.address, project=project)

    def start(self, name: str) -> ServerProcess:
        """Start a service by its command, or start it again."""
        options = ["--metrics-port", str(self.metrics_port)] if name == "lookup" else []
        self.processes[name] = ServerProcess.start(
            name,
            [sys.executable, "-m", *self.COMMANDS[name], *options],
            log=self.root / f"{name}.log",
            cwd=self.root,
            environment=self.environment,
            die_with_parent=True,
        )
        return self.processes[name]

    def kill(self, name: str) -> None:
        """SIGKILL to a service and its children, as the kernel's out-of-memory killer would."""
        kill_tree(self.processes[name].identity)
        self.processes[name].popen.wait()

    def stop(self, name: str) -> int:
        """SIGTERM; returns the exit code."""
        process = self.processes[name]
        process.stop(60.0)
        return int(process.popen.returncode)

    def child_of(self, name: str) -> int:
        """Process id of a worker's one child."""
        (child,) = psutil.Process(self.processes[name].identity.pid).children()
        return int(child.pid)

    def report(self, queue: str) -> Mapping[str, Any] | None:
        """What the running worker of this queue last said of itself; None before it has."""
        parent = self.processes[queue].identity.pid
        alive = {child.pid for child in psutil.Process(parent).children()} if self.processes[queue].running() else set()
        with self.engine.connect() as connection:
            rows = connection.execute(select(_REPORTS).where(_REPORTS.c.queue == queue)).mappings().all()
        mine = [dict(row) for row in rows if row["pid"] in alive]
        return mine[0] if mine else None

    def ready(self, *queues: str) -> None:
        """Wait until each worker is up and, for lookups, serves a release."""
        for queue in queues:
            eventually(lambda queue=queue: self._is_ready(queue), f"the {queue} worker getting ready")

    def serves(self, release_id: str) -> None:
        """Wait until the lookup worker reports that it answers from ``release_id``."""
        eventually(lambda: (self.report("lookup") or {}).get("release_id") == release_id, f"the swap to {release_id}")

    def _is_ready(self, queue: str) -> bool:
        process = self.processes[queue]
        assert process.running(), f"{queue} ended:\n{process.log_tail()}"
        report = self.report(queue)
        return report is not None and (queue != "lookup" or report["release_id"] is not None)


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty images of the demo corpus and a few for one release alone, each from another near-duplicate group."""
    table = pq.read_table(CORPUS)
    seen: set[int] = set()
    rows = [
        row
        for row, group in enumerate(table.column("near_duplicate_group").to_pylist())
        if not (group in seen or seen.add(group))
    ]
    chosen = rows[:: max(1, len(rows) // (ITEMS + APART))][: ITEMS + APART]
    path = tmp_path_factory.mktemp("corpus") / "items.parquet"
    pq.write_table(table.take(chosen), path)
    return path


@pytest.fixture(scope="session")
def cluster(tiny_corpus: Path, collector: Any) -> Iterator[Cluster]:
    """Everything running; two releases built, the first one (with sketches) active; spans go to ``collector``."""
    root = Path(tempfile.mkdtemp(prefix="byline-e2e-"))
    root.chmod(0o711)
    # Commits are written, if not flushed: tests kill this server's processes, and what was acknowledged must stay.
    settings = {"fsync": "off", "full_page_writes": "off"}
    postgres = PrivatePostgres(root / "postgres", die_with_parent=True, settings=settings)
    valkey = PrivateValkey(root / "valkey", die_with_parent=True)
    postgres.start()
    valkey.start()
    migrate(postgres.url)
    engine = make_engine(postgres.url, 4)
    blobs = BlobStore(root / "blobs")
    ingest(engine, blobs, tiny_corpus, CORPUS_ID)
    first, second = _publish(root, engine, blobs)
    address = f"127.0.0.1:{free_port()}"
    environment = _environment(root, postgres, valkey, address) | {"BYLINE_OTLP_ENDPOINT": collector.address}
    running = Cluster(root, environment, address, engine, postgres, valkey, blobs, (first, second), free_port())
    try:
        for name in Cluster.COMMANDS:
            running.start(name)
        running.ready("lookup", "verification")
        yield running
    finally:
        for process in running.processes.values():
            if process.running():
                process.popen.send_signal(signal.SIGTERM)
        for process in running.processes.values():
            process.stop(20.0)
        engine.dispose()
        valkey.stop()
        postgres.stop()
        shutil.rmtree(root, ignore_errors=True)


def _environment(root: Path, postgres: PrivatePostgres, valkey: PrivateValkey, address: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BYLINE_")}
    paths = [str(ROOT), str(ROOT / "shared"), str(ROOT / "protos"), kept.get("PYTHONPATH", "")]
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "BYLINE_DATABASE_URL": postgres.url,
        "BYLINE_REDIS_URL": valkey.url,
        "BYLINE_STATE_DIR": str(root),
        "BYLINE_GRPC_ADDRESS": address,
        "BYLINE_MODEL_ID": MODEL_ID,
        "BYLINE_CORPUS_ID": CORPUS_ID,
        "BYLINE_MODEL_DIRECTORY": str(root / "model"),
        "BYLINE_FEATURE_SPEC": FEATURES,
        "BYLINE_LEASE_SECONDS": str(LEASE_S),
        "BYLINE_MAX_ATTEMPTS": "10",
        "BYLINE_VERIFY_DRAWS": "64",
        "BYLINE_ESTIMATE_DRAWS": "16",
        "BYLINE_LOG_FORMAT": "json",
    }


def _publish(root: Path, engine: Engine, blobs: BlobStore) -> tuple[str, str]:
    """Write the model and two releases of it, heads with different seeds; the first one is activated."""
    import torch

    from byline.catalog.decode import decode_image
    from byline.diffusion.model import DiffusionModel
    from byline.diffusion.tiny import write_tiny_pipeline
    from byline.features import load_extractor
    from byline.ranker.head import Head, HeadConfig, feature_blocks
    from byline.releases.builder import build_release
    from byline.releases.manifest import ReleaseManifest
    from byline.teachers import TeacherItem
    from byline.teachers.first_order import AbuPlusLinear
    from byline.teachers.natural_gradient import UnlearningSettings
    from byline.teachers.registry import ensure_curvature
    from byline.teachers.sketch_fit import fit_sketches

    torch.set_num_threads(1)
    model = DiffusionModel.load(write_tiny_pipeline(root / "model"))
    catalog = CatalogStore(engine)
    catalog.add_model(ModelRecord(MODEL_ID, CORPUS_ID, root / "model", model.revision))
    items = catalog.items(CORPUS_ID)
    _set_apart(catalog, engine, [item.item_id for item in items[ITEMS:]])
    extractor = load_extractor(FEATURES, model=model)
    images = [decode_image(blobs.get(item.image_sha256)) for item in items]
    features = extractor.extract(images, [item.caption for item in items])
    pairs = [TeacherItem(item.item_id, image, item.caption) for item, image in zip(items, images, strict=True)]
    curvature = ensure_curvature(model, pairs, root / "model" / "curvature", samples=128)
    wanted = UnlearningSettings(corpus_size=len(pairs), item_draws=16, noise="shared")
    fitted = fit_sketches(AbuPlusLinear(model, curvature, wanted), pairs[:ITEMS], dimensions=16, store=root / "fit")
    fitted.save(root / "model" / "sketches")
    registry = ReleaseRegistry(engine)
    published: list[str] = []
    for number, part in ((1, slice(0, ITEMS)), (2, slice(APART, ITEMS + APART))):
        head = Head(HeadConfig(extractor.dim, feature_blocks(extractor.spec.encoders, extractor.dims), (32,), 16, 0.0))
        head.initialise(features, features, torch.Generator().manual_seed(number))
        directory = build_release(
            root / "releases",
            release_id=f"r{number}",
            model_id=MODEL_ID,
            model_revision=model.revision,
            corpus_id=CORPUS_ID,
            head=head,
            feature_spec=extractor.spec.name,
            preprocessing_hash=extractor.preprocessing_hash,
            item_ids=np.array([item.item_id for item in items[part]], dtype=np.int64),
            item_features=features[part],
            catalogue=items[part],
            calibrator={},
            metrics={"map": 0.1},
            parent=published[-1] if published else None,
            labels={"queries": 0, "digest": ""},
            teacher_id="none",
            golden_features=features[:2],
            created_at=datetime(2026, 1, number, tzinfo=UTC),
            git_sha="",
            sketches=_sketches(fitted) if number == 1 else None,
        )
        registry.register(ReleaseManifest.read(directory), directory)
        published.append(f"r{number}")
    registry.activate(MODEL_ID, published[0])
    return published[0], published[1]


def _set_apart(catalog: CatalogStore, engine: Engine, item_ids: Sequence[int]) -> None:
    """Let items belong to another corpus: within this one they would come into every release as a delta."""
    catalog.add_corpus(APART_CORPUS_ID)
    with engine.begin() as connection:
        moved = text("UPDATE items SET corpus_id = :corpus WHERE item_id = ANY(:ids)")
        connection.execute(moved, {"corpus": APART_CORPUS_ID, "ids": list(item_ids)})


def _sketches(fitted: Any) -> Any:
    """What the first release carries; the second one has no sketches."""
    from byline.releases.sketches import SketchParts, section_of

    section = section_of(
        teacher_id=fitted.teacher_id, dimensions=fitted.basis.dimensions, selection=fitted.basis.selection,
        query_draws=fitted.basis.settings.query_draws, fidelity=fitted.fidelity,
        token_rank=fitted.tokens.basis.rank,
    )  # fmt: skip
    return SketchParts(fitted.item_ids, fitted.sketches, fitted.basis, section, fitted.tokens)


@pytest.fixture
def picture(cluster: Cluster) -> Callable[[int], tuple[bytes, Item]]:
    """The n-th image of the corpus as a query: its bytes and what it shows."""
    items = CatalogStore(cluster.engine).items(CORPUS_ID)

    def nth(number: int) -> tuple[bytes, Item]:
        item = items[number % len(items)]
        return cluster.blobs.get(item.image_sha256), item

    return nth


@pytest.fixture
def project() -> str:
    """A project of the test's own, so that its jobs are easy to list."""
    return f"e2e-{uuid.uuid4().hex[:8]}"
