"""Two models side by side in one worker: each with its own corpus, release, withdrawals and swap."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sqlalchemy import text

from byline.catalog.decode import decode_image
from byline.catalog.items import Item
from byline.catalog.store import ModelRecord
from byline.config import load_settings
from byline.diffusion.model import DiffusionModel
from byline.features import FeatureExtractor, load_extractor
from byline.jobs import Job, NewJob, Stage, State
from byline.ranker.head import Head, HeadConfig, feature_blocks
from byline.releases.builder import build_release
from byline.releases.manifest import ReleaseManifest
from byline.releases.registry import ReleaseRegistry
from services.workers.child import WorkerChild
from services.workers.models import wanted_models

from .conftest import Bench, png

FEATURES = "denoiser"


class Side:
    """One of the two models: its items and its releases."""

    def __init__(self, bench: Bench, model_id: str, directory: Path, first_item: int, root: Path) -> None:
        self.bench, self.model_id, self.root = bench, model_id, root
        self.registry = ReleaseRegistry(bench.engine)
        self.items = [
            Item(first_item + n, f"a blue dog w{first_item + n}", image_sha256=bench.blobs.put(png(first_item + n)))
            for n in range(5)
        ]
        bench.catalog.add_corpus(f"{model_id}-corpus")
        bench.catalog.add_items(f"{model_id}-corpus", self.items)
        self.revision = DiffusionModel.load(directory).revision
        bench.catalog.add_model(ModelRecord(model_id, f"{model_id}-corpus", directory, self.revision))

    def publish(self, release_id: str, extractor: FeatureExtractor, seed: int = 1) -> None:
        images = [decode_image(self.bench.blobs.get(item.image_sha256)) for item in self.items]
        features = extractor.extract(images, [item.caption for item in self.items])
        head = Head(HeadConfig(extractor.dim, feature_blocks(extractor.spec.encoders, extractor.dims), (8,), 4, 0.0))
        head.initialise(features, features, torch.Generator().manual_seed(seed))
        directory = build_release(
            self.root / "releases", release_id=release_id, model_id=self.model_id, model_revision=self.revision,
            corpus_id=f"{self.model_id}-corpus", head=head, feature_spec=FEATURES,
            preprocessing_hash=extractor.preprocessing_hash, item_ids=np.array([i.item_id for i in self.items]),
            item_features=features, catalogue=self.items, calibrator={}, metrics={}, parent=None,
            labels={"queries": 0, "digest": ""}, teacher_id="none", golden_features=features[:1],
            created_at=datetime(2026, 1, 1, tzinfo=UTC),
        )  # fmt: skip
        self.registry.register(ReleaseManifest.read(directory), directory)
        self.registry.activate(self.model_id, release_id)

    def ask(self, number: int) -> Job:
        """A lookup job for the picture and caption of one of the items."""
        item = self.items[number]
        new = NewJob(project_id="p", request_id=f"{self.model_id}-{number}-{time.monotonic_ns()}",
                     model_id=self.model_id, prompt=item.caption, image_sha256=item.image_sha256, top_k=3)
        return self.bench.jobs.create(new)[0]


def until(found: Callable[[], bool], what: str) -> None:
    ends, pause = time.monotonic() + 90, threading.Event()
    while not found():
        assert time.monotonic() < ends, what
        pause.wait(0.02)


def answers(bench: Bench, jobs: list[Job]) -> list[dict[str, Any]]:
    """The answers, once all of them are there."""
    until(lambda: all(bench.jobs.find(job.id).state is State.SUCCEEDED for job in jobs), "the jobs were not answered")
    return [dict(bench.jobs.results(job.id)[Stage.LOOKUP].result) for job in jobs]


def named(answer: dict[str, Any]) -> set[int]:
    return {int(one["item_id"]) for one in answer["influences"]}


@pytest.fixture(scope="module")
def extractor(tiny_model: Path) -> FeatureExtractor:
    return load_extractor(FEATURES, model=DiffusionModel.load(tiny_model))


def test_one_worker_answers_for_two_models_and_never_mixes_them(
    bench: Bench, extractor: FeatureExtractor, tiny_model: Path, tmp_path: Path, database_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.workers.models.LOOK_S", 0.1)
    left = Side(bench, "left", tiny_model, 100, tmp_path)
    left.publish("left1", extractor)
    settings = load_settings(
        database_url=database_url, state_dir=tmp_path, model_id="left", corpus_id="left-corpus",
        feature_spec=FEATURES, blob_dir=bench.blobs.root, model_directory=tiny_model, heartbeat_seconds=0.2,
    )
    child = WorkerChild("lookup", settings, "w1", threading.Event())
    try:
        child.start()
        right = Side(bench, "right", tiny_model, 200, tmp_path)  # registered while the worker runs
        waiting = right.ask(0)
        right.publish("right1", extractor)
        jobs = [side.ask(number) for number in range(3) for side in (left, right)]
        found = answers(bench, [waiting, *jobs])
        assert [answer["release_id"] for answer in found] == ["right1", *["left1", "right1"] * 3]
        for answer, side in zip(found[1:], [left, right] * 3, strict=True):
            assert named(answer) <= {item.item_id for item in side.items} and len(answer["influences"]) == 3
        # Each model's deltas are kept apart: however many models there are, none reads its own again because of others.
        known = {name: set(one.deltas._known) for name, one in child._models._models.items()}
        assert known == {"left": {"left1"}, "right": {"right1"}, "tiny": set()}
        # A withdrawal and a swap of one model leave the other as it was.
        bench.catalog.withdraw([201])
        right.publish("right2", extractor, seed=2)
        until(lambda: child._state().models["right"].release_id == "right2", "the swap")
        after = answers(bench, [right.ask(1), left.ask(1)])
        assert [answer["release_id"] for answer in after] == ["right2", "left1"]
        assert 201 not in named(after[0]) and len(after[0]["influences"]) == 3
        query = text("SELECT release_id FROM worker_releases WHERE model_id IN ('left', 'right') ORDER BY model_id")

        def reported() -> bool:
            with bench.engine.connect() as connection:
                return connection.execute(query).scalars().all() == ["left1", "right2"]

        until(reported, "the report of both models")
    finally:
        child.close()


def test_a_worker_leaves_jobs_of_models_it_does_not_serve_to_others(
    bench: Bench, extractor: FeatureExtractor, tiny_model: Path, tmp_path: Path, database_url: str
) -> None:
    left, right = (Side(bench, name, tiny_model, start, tmp_path) for name, start in (("left", 100), ("right", 200)))
    left.publish("left1", extractor)
    right.publish("right1", extractor)
    settings = load_settings(
        database_url=database_url, state_dir=tmp_path, model_id="left", corpus_id="left-corpus", serve_models="",
        feature_spec=FEATURES, blob_dir=bench.blobs.root, model_directory=tiny_model,
    )
    child = WorkerChild("lookup", settings, "w1", threading.Event())
    try:
        child.start()
        other, own = right.ask(0), left.ask(0)
        answers(bench, [own])
        child.handle(str(other.id), Stage.LOOKUP)  # its doorbell, too
        row = bench.jobs.find(other.id)
        assert row is not None and (row.state, row.attempt) == (State.QUEUED, 0)
    finally:
        child.close()


def test_the_setting_says_which_models_are_served(tmp_path: Path) -> None:
    registered = [ModelRecord(name, name, tmp_path, "r") for name in ("own", "a", "b")]
    settings = load_settings(model_id="own", database_url="postgresql://nobody@127.0.0.1:1/none")

    def served(asked: str) -> list[str]:
        return [one.model_id for one in wanted_models(settings.model_copy(update={"serve_models": asked}), registered)]

    assert served("*") == ["a", "b"] and served("b, own") == ["b"] and served("") == []
