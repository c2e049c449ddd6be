"""Curation opens the head of a release on the terms of a worker: registered, signed, unaltered."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from byline.catalog.items import Item
from byline.evaluation.calibration import Calibrator
from byline.ranker.head import Head, HeadConfig, feature_blocks
from byline.releases.builder import build_release
from byline.releases.manifest import CALIBRATOR, ReleaseManifest
from byline.security.signing import Keyring, sign_manifest
from services.curation.head import Heads

KEYRING = Keyring.parse("k" * 40)
DIM = 8


def release(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((20, DIM)).astype(np.float32)
    head = Head(HeadConfig(DIM, feature_blocks(["minilm"], [DIM]), hidden=(4,), out_dim=4))
    head.initialise(features, features[:3], torch.Generator().manual_seed(0))
    return build_release(
        folder, model_id="m", model_revision="rev", corpus_id="c", head=head.eval(), feature_spec="minilm",
        preprocessing_hash="h" * 16, item_ids=np.arange(20, dtype=np.int64), item_features=features,
        catalogue=[Item(i, f"item {i}") for i in range(20)], calibrator=Calibrator().to_json(), metrics={}, parent=None,
        labels={"queries": 5, "digest": "d"}, teacher_id="t", golden_features=features[:2],
        created_at=datetime(2026, 11, 23, tzinfo=UTC), git_sha="abc",
    )  # fmt: skip


def heads(directory: Path) -> Heads:
    record = SimpleNamespace(directory=directory, manifest=ReleaseManifest.read(directory))
    registry: Any = SimpleNamespace(get=lambda release_id: record)
    return Heads(registry, "m", "h" * 16, keyring=KEYRING)


def test_curation_uses_no_head_that_is_not_signed_or_was_altered(tmp_path: Path) -> None:
    directory = release(tmp_path)
    assert heads(directory).of("r1") is None
    sign_manifest(directory, ReleaseManifest.read(directory).digest, KEYRING)
    assert heads(directory).of("r1") is not None
    (directory / CALIBRATOR).chmod(0o644)
    (directory / CALIBRATOR).write_text((directory / CALIBRATOR).read_text() + " ")
    assert heads(directory).of("r1") is None
