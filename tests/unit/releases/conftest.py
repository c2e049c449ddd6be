"""A small but real release: a head, sixty items, three golden queries."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from byline.catalog.items import Item
from byline.ranker.head import Head, HeadConfig, feature_blocks
from byline.releases.builder import build_release

ITEMS = 60
DIM = 16


def make_head(seed: int) -> Head:
    head = Head(HeadConfig(DIM, feature_blocks(["minilm"], [DIM]), hidden=(12,), out_dim=8))
    rng = np.random.default_rng(seed)
    head.initialise(
        rng.standard_normal((ITEMS, DIM)).astype(np.float32),
        rng.standard_normal((5, DIM)).astype(np.float32),
        torch.Generator().manual_seed(seed),
    )
    return head.eval()


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Path]:
    """Build a release under ``tmp_path/releases``; keywords replace the defaults."""
    rng = np.random.default_rng(3)
    ids = np.sort(rng.permutation(10**6)[:ITEMS]).astype(np.int64)
    arguments: dict[str, Any] = {
        "model_id": "m", "model_revision": "rev", "corpus_id": "c", "head": make_head(0), "feature_spec": "minilm",
        "preprocessing_hash": "h" * 16, "item_ids": ids,
        "item_features": rng.standard_normal((ITEMS, DIM)).astype(np.float32),
        "catalogue": [Item(int(i), f"picture {i}", ("a",), "Ada", "public domain") for i in ids],
        "calibrator": {"noise_floor": 0.1}, "metrics": {"map": 0.5}, "parent": None,
        "labels": {"queries": 5, "digest": "d"}, "teacher_id": "t",
        "golden_features": rng.standard_normal((3, DIM)).astype(np.float32),
        "created_at": datetime(2026, 11, 23, 12, tzinfo=UTC), "git_sha": "abc",
    }  # fmt: skip

    def make(**changes: Any) -> Path:
        return build_release(tmp_path / "releases", **{**arguments, **changes})

    return make
