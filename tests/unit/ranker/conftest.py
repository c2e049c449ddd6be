"""A small world with a known teacher: latent vectors make both the features and the influence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from byline.ranker.head import FeatureBlock
from byline.ranker.labelled_set import LabelledSet

BLOCKS = (FeatureBlock("image", 48), FeatureBlock("text", 16))


@dataclass(frozen=True)
class Planted:
    """Train and validation sets over the same items, labelled from disjoint noise."""

    train: LabelledSet
    validation: LabelledSet
    blocks: tuple[FeatureBlock, ...] = BLOCKS


def planted_world(queries: int = 72, held_out: int = 24, items: int = 300, latent: int = 12, seed: int = 0) -> Planted:
    """Influence weighs few latent directions strongly, which raw cosines cannot know."""
    rng = np.random.default_rng(seed)
    total = queries + held_out
    centres = rng.normal(size=(20, latent))
    item = centres[rng.integers(0, 20, items)] + 0.6 * rng.normal(size=(items, latent))
    query = centres[rng.integers(0, 20, total)] + 0.6 * rng.normal(size=(total, latent))
    weight = rng.exponential(size=latent) ** 2
    tau = (query * weight) @ item.T + 3.0 * np.tanh(item @ rng.normal(size=latent))
    halves = [tau + 0.3 * tau.std() * rng.normal(size=tau.shape) for _ in range(2)]
    item_blocks, query_blocks = [], []
    for block in BLOCKS:
        mix = rng.normal(size=(latent, block.dim)) / np.sqrt(latent)
        item_blocks.append(np.tanh(item @ mix) + 0.3 * rng.normal(size=(items, block.dim)))
        query_blocks.append(np.tanh(query @ mix) + 0.3 * rng.normal(size=(total, block.dim)) + 0.4)
    item_features = np.concatenate(item_blocks, axis=1).astype(np.float32)
    query_features = np.concatenate(query_blocks, axis=1).astype(np.float32)
    ids = np.arange(1000, 1000 + items, dtype=np.int64)

    def labelled(rows: slice, half: int) -> LabelledSet:
        return LabelledSet(query_features[rows], ids, item_features, halves[half][rows].astype(np.float32))

    return Planted(labelled(slice(0, queries), 0), labelled(slice(queries, total), 1))


@pytest.fixture
def make_planted() -> Callable[..., Planted]:
    return planted_world


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
