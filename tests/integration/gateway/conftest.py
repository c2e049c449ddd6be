"""A gateway on a real socket with a real Postgres, and a worker inside the test that answers through JobStore."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sqlalchemy import text

from byline.catalog.items import Item
from byline.catalog.store import ModelRecord
from byline.config import load_settings
from byline.db import make_engine
from byline.db.listen import JOBS, Listener
from byline.jobs import Claim, Stage
from byline.jobs.store import JobStore
from byline.releases.manifest import (
    REQUIRED_FILES,
    SKETCH_FILES,
    FileEntry,
    LabelSet,
    ReleaseManifest,
    SketchSection,
)
from byline.releases.registry import ReleaseRegistry
from byline.security.keys import KeyStore
from byline.security.scopes import ALL_SCOPES, PROJECT_SCOPES
from services.gateway.context import GatewayContext, build_context
from services.gateway.server import Gateway, start

MODEL = "openclipart"
ITEMS = tuple(range(101, 131))
DIM = 4


def png(color: str = "red", size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def manifest(release_id: str, parent: str | None = None, sketches: SketchSection | None = None) -> ReleaseManifest:
    names = (*REQUIRED_FILES, *(SKETCH_FILES if sketches else ()))
    return ReleaseManifest(
        release_id=release_id, model_id=MODEL, model_revision="rev1", corpus_id=MODEL, parent=parent,
        created_at=datetime(2026, 1, 1 + int(release_id[1:]), tzinfo=UTC), feature_spec="minilm",
        preprocessing_hash="p", feature_dim=8, embedding_dim=DIM, items=len(ITEMS), index_factory="Flat",
        teacher_id="abu_plus", labels=LabelSet(queries=3, digest="d"), metrics={"map": 0.5, "gate": {"p": 0.01}},
        files={name: FileEntry(sha256="0" * 64, bytes=1) for name in names}, sketches=sketches,
    )  # fmt: skip


def influences(ids: tuple[int, ...], **more: Any) -> list[dict[str, Any]]:
    return [
        {"item_id": str(item_id), "rank": rank, "cosine": 1.0 - rank / 100, "caption": f"item {item_id}",
         "creator": "ann", "licence": "CC0", "near_duplicate_group": str(item_id), "image_sha256": "",
         "retrieved_rank": rank, **more}
        for rank, item_id in enumerate(ids, start=1)
    ]  # fmt: skip


class AnsweringWorker:
    """Completes jobs through the store as soon as they are announced, until it is told to hold."""

    def __init__(self, store: JobStore, url: str) -> None:
        self.store = store
        self.hold = threading.Event()
        self._stop = threading.Event()
        self._thread = Listener(url, [JOBS], self._stop, lambda _, job_id: self._answer(job_id), self._ready.set)

    _ready = threading.Event()

    def start(self) -> None:
        self._ready.clear()
        self._thread.start()
        assert self._ready.wait(10)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(10)

    def _answer(self, payload: str) -> None:
        import uuid

        if self.hold.is_set():
            return
        job_id = uuid.UUID(payload)
        for stage in (Stage.LOOKUP, Stage.ESTIMATE, Stage.VERIFY):
            claim = self.store.claim(job_id, stage, "in-test", 30.0, "r1")
            if claim is not None:
                self.store.complete(claim, answer(claim))


TIER_OF = {Stage.LOOKUP: "RETRIEVED", Stage.ESTIMATE: "ESTIMATED", Stage.VERIFY: "VERIFIED"}


def answer(claim: Claim) -> dict[str, Any]:
    scored = claim.stage is not Stage.LOOKUP
    more = {"tau": 0.25, "standard_error": 0.01} if scored else {}
    return {
        "tier": TIER_OF[claim.stage], "release_id": claim.job.release_id,
        "model_revision": "rev1", "not_attributable": False, "influences": influences(ITEMS, **more),
        "timings_ms": {"search": 0.5}, "teacher_id": "abu_plus" if scored else None,
        "draws": 64 if scored else None,
    }  # fmt: skip


@dataclass
class Running:
    """A started gateway and what the test may reach around it."""

    address: str
    context: GatewayContext
    store: JobStore
    registry: ReleaseRegistry
    gateway: Gateway
    loop: asyncio.AbstractEventLoop

    def call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)


@pytest.fixture
def running(database_url: str, tmp_path: Path) -> Iterator[Running]:
    """A gateway without any release."""
    settings = load_settings(database_url=database_url, state_dir=tmp_path, grpc_address="127.0.0.1:0")
    context = build_context(settings)
    context.catalog.add_model(ModelRecord(MODEL, MODEL, tmp_path, "rev1"))
    sha256 = context.blobs.put(png("blue"))
    context.catalog.add_items(MODEL, [Item(i, f"item {i}", creator="ann", image_sha256=sha256) for i in ITEMS])
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    gateway = asyncio.run_coroutine_threadsafe(start(context, settings.grpc_address, database_url), loop).result(20)
    engine = make_engine(database_url, pool_size=4)
    yield Running(gateway.address, context, JobStore(engine, {}), ReleaseRegistry(engine), gateway, loop)
    asyncio.run_coroutine_threadsafe(gateway.stop(0.0, 1.0), loop).result(20)
    context.close()
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()
    engine.dispose()


@pytest.fixture
def served(running: Running, tmp_path: Path) -> Running:
    """A gateway whose model has the active release r1."""
    running.registry.register(manifest("r1"), tmp_path / "r1")
    running.registry.activate(MODEL, "r1")
    return running


@pytest.fixture
def worker(served: Running, database_url: str) -> Iterator[AnsweringWorker]:
    """A worker that answers every job at once."""
    worker = AnsweringWorker(served.store, database_url)
    worker.start()
    yield worker
    worker.stop()


class Keyed:
    """A gateway that asks for keys, and where keys are made."""

    def __init__(self, context: GatewayContext, gateway: Gateway, loop: asyncio.AbstractEventLoop) -> None:
        self.context, self.gateway, self.loop = context, gateway, loop
        self.address = gateway.address
        self.keys = KeyStore(context.engine)

    def key(self, project: str | None = "acme", scopes: Any = None, **more: Any) -> str:
        wanted = scopes or (PROJECT_SCOPES if project else ALL_SCOPES)
        return self.keys.create(project_id=project, name="test", scopes=wanted, **more).token

    def events(self) -> list[Any]:
        with self.context.engine.connect() as connection:
            return list(connection.execute(text("SELECT * FROM audit_events ORDER BY id")).mappings())


@pytest.fixture
def keyed(database_url: str, tmp_path: Path) -> Iterator[Keyed]:
    """A gateway with the active release r1 that asks everybody for a key."""
    settings = load_settings(
        database_url=database_url, state_dir=tmp_path, grpc_address="127.0.0.1:0", auth_mode="keys", rate_per_second=0
    )
    context = build_context(settings)
    context.catalog.add_model(ModelRecord(MODEL, MODEL, tmp_path, "rev1"))
    sha256 = context.blobs.put(png("blue"))
    context.catalog.add_items(MODEL, [Item(i, f"item {i}", creator="ann", image_sha256=sha256) for i in ITEMS])
    context.registry.register(manifest("r1"), tmp_path / "r1")
    context.registry.activate(MODEL, "r1")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    gateway = asyncio.run_coroutine_threadsafe(start(context, settings.grpc_address, database_url), loop).result(60)
    yield Keyed(context, gateway, loop)
    asyncio.run_coroutine_threadsafe(gateway.stop(0.0, 1.0), loop).result(60)
    context.close()
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()
