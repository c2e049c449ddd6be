"""Registry, loader and holder together on a real Postgres: an activation reaches a serving process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from sqlalchemy import Engine

from byline.catalog.items import Item
from byline.db.session import make_engine
from byline.ranker.head import Head, HeadConfig, feature_blocks
from byline.releases.builder import build_release
from byline.releases.holder import ReleaseHolder, Swap
from byline.releases.loader import Release, load_release
from byline.releases.manifest import ReleaseManifest
from byline.releases.registry import ActiveRelease, ReleaseRegistry

DIM, ITEMS = 12, 40
CREATED = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = make_engine(database_url)
    yield engine
    engine.dispose()


def build(root: Path, number: int) -> Path:
    rng = np.random.default_rng(number)
    features = rng.standard_normal((ITEMS, DIM)).astype(np.float32)
    head = Head(HeadConfig(DIM, feature_blocks(["minilm"], [DIM]), hidden=(8,), out_dim=6))
    head.initialise(features, features[:4], torch.Generator().manual_seed(number))
    return build_release(
        root, release_id=f"r{number}", model_id="m", model_revision="rev", corpus_id="c", head=head.eval(),
        feature_spec="minilm", preprocessing_hash="h", item_ids=list(range(ITEMS)), item_features=features,
        catalogue=[Item(n, f"release {number} item {n}") for n in range(ITEMS)], calibrator={}, metrics={},
        parent=None, labels={"queries": 1, "digest": "d"}, teacher_id="t", golden_features=features[:2],
        created_at=CREATED + timedelta(minutes=number),
    )  # fmt: skip


def test_an_activation_reaches_a_serving_process_and_a_corrupt_one_does_not(
    engine: Engine, database_url: str, tmp_path: Path
) -> None:
    registry = ReleaseRegistry(engine)
    for number in (1, 2, 3):
        directory = build(tmp_path, number)
        registry.register(ReleaseManifest.read(directory), directory)

    def load(release_id: str) -> Release:
        record = registry.get(release_id)
        return load_release(record.directory, expected=record.manifest)

    swapped = threading.Semaphore(0)
    swaps: list[Swap] = []

    def on_swap(swap: Swap) -> None:
        swaps.append(swap)
        swapped.release()

    holder: ReleaseHolder[Release] = ReleaseHolder(load, lambda: registry.active("m"), on_swap=on_swap)
    stop, reading = threading.Event(), threading.Event()
    wrong: list[str] = []
    answers = [0]

    def read() -> None:
        query = np.ones(DIM, dtype=np.float32)
        while not stop.is_set():
            with holder.current() as release:
                hits = release.search(query, 5)
                captions = {release.catalogue[hit.item_id].caption.split(" item ")[0] for hit in hits}
                if captions != {f"release {release.release_id[1:]}"} or len(hits) != 5:
                    wrong.append(f"{release.release_id}: {captions}")
                answers[0] += 1
                reading.set()

    watcher = holder.watch(stop, database_url, poll_s=60.0)
    registry.activate("m", "r1")
    assert swapped.acquire(timeout=30)
    reader = threading.Thread(target=read)
    reader.start()
    assert reading.wait(30)

    damaged = tmp_path / "r2" / "embeddings.faiss"
    damaged.chmod(0o644)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x00\x00")
    registry.activate("m", "r2")
    registry.activate("m", "r3")
    assert swapped.acquire(timeout=30)
    registry.rollback("m")  # to the damaged one: r3 goes on serving
    registry.activate("m", "r1")
    assert swapped.acquire(timeout=30)
    stop.set()
    reader.join(30)
    watcher.join(30)
    assert not watcher.is_alive()
    assert [swap.release_id for swap in swaps] == ["r1", "r3", "r1"]
    assert not wrong
    assert answers[0] > 0


def test_a_watch_survives_a_load_and_a_registry_that_crash(engine: Engine, database_url: str, tmp_path: Path) -> None:
    registry = ReleaseRegistry(engine)
    directory = build(tmp_path, 1)
    registry.register(ReleaseManifest.read(directory), directory)
    faults: list[Exception] = [RuntimeError("no tables"), MemoryError("no room"), OSError("no disk")]
    swapped, shown = threading.Event(), []

    def fault() -> None:
        if faults:
            raise faults.pop(0)

    def active() -> ActiveRelease | None:
        shown.append(holder.status.error)
        if len(faults) == 3:
            fault()
        return registry.active("m")

    def load(release_id: str) -> Release:
        fault()
        return load_release(registry.get(release_id).directory)

    def on_swap(_swap: Swap) -> None:
        swapped.set()
        raise RuntimeError("a callback's own fault")

    holder: ReleaseHolder[Release] = ReleaseHolder(load, active, on_swap=on_swap)
    registry.activate("m", "r1")
    stop = threading.Event()
    watcher = holder.watch(stop, database_url, poll_s=0.05)
    assert swapped.wait(30)
    assert watcher.is_alive()
    stop.set()
    watcher.join(30)
    assert not watcher.is_alive()
    assert [error.split(":")[0] for error in shown if error][:3] == ["RuntimeError", "MemoryError", "OSError"]
    assert holder.status.release_id == "r1"
