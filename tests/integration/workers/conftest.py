"""A tiny model and corpus in a real database, for the stages of the verification worker."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import Engine

from byline.catalog.blobs import BlobStore
from byline.catalog.items import Item
from byline.catalog.store import CatalogStore, ModelRecord
from byline.db import make_engine
from byline.diffusion.model import directory_revision
from byline.diffusion.tiny import write_tiny_pipeline
from byline.jobs.runner import StageRunner
from byline.jobs.store import JobStore
from services.workers.teacher_bench import TeacherBench


def png(seed: int) -> bytes:
    """A small picture of coloured noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@dataclass
class Bench:
    """What a stage is given, on a database of its own."""

    engine: Engine
    jobs: JobStore
    catalog: CatalogStore
    blobs: BlobStore
    teachers: TeacherBench
    items: list[Item]
    stop: threading.Event

    def runner(self, worker_id: str = "w1", lease_s: float = 30.0) -> StageRunner:
        """A runner as the child has one."""
        return StageRunner(self.jobs, worker_id, lease_s, time.monotonic, stop=self.stop)

    def withdrawn(self) -> frozenset[int]:
        """As the child asks for it."""
        return self.catalog.withdrawn("tiny")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight pipeline of some hundred kilobytes."""
    import torch

    torch.set_num_threads(1)
    return write_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def curvature_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fitted once per session: its fit is not what these tests are about."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def bench(database_url: str, tiny_model: Path, curvature_cache: Path, tmp_path: Path) -> Iterator[Bench]:
    """Six items, a model, and everything a stage needs."""
    engine = make_engine(database_url, 5)
    blobs = BlobStore(tmp_path / "blobs")
    catalog = CatalogStore(engine)
    items = [
        Item(number, f"a red cat w{number}", creator=f"artist {number}", image_sha256=blobs.put(png(number)))
        for number in range(1, 7)
    ]
    catalog.add_corpus("tiny")
    catalog.add_items("tiny", items)
    catalog.add_model(ModelRecord("tiny", "tiny", tiny_model, directory_revision(tiny_model)))
    teachers = TeacherBench(
        model_directory=tiny_model,
        cache_dir=curvature_cache,
        corpus_id="tiny",
        catalog=catalog,
        blobs=blobs,
        device="cpu",
        seed=0,
        curvature_samples=64,
    )
    yield Bench(engine, JobStore(engine, {}), catalog, blobs, teachers, items, threading.Event())
    engine.dispose()
