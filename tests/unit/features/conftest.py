"""Tiny random-weight models in the layout transformers publishes, and pictures to look at."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

TEXTS = ["a cat", "two red boats on a lake", "", "tree", "a cat"]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    shapes = [(64, 64), (40, 70), (90, 33), (64, 64), (8, 8)]
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in shapes]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories by encoder name."""
    import transformers as t

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    size = {"size": {"height": 32, "width": 32}}
    t.ViTModel(t.ViTConfig(**small, image_size=32, patch_size=8)).save_pretrained(root / "dino")
    t.ViTImageProcessorPil(**size).save_pretrained(root / "dino")
    t.Dinov2Model(t.Dinov2Config(**small, image_size=32, patch_size=8)).save_pretrained(root / "dinov2")
    t.BitImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}).save_pretrained(
        root / "dinov2"
    )
    vision = t.CLIPVisionConfig(**small, image_size=32, patch_size=8, projection_dim=12)
    t.CLIPVisionModelWithProjection(vision).save_pretrained(root / "clip_image")
    t.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(root / "clip_image")  # fmt: skip
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    text = t.CLIPTextConfig(
        **small, vocab_size=len(words), max_position_embeddings=16, projection_dim=12,
        bos_token_id=len(words) - 2, eos_token_id=len(words) - 1, pad_token_id=len(words) - 1,
    )  # fmt: skip
    t.CLIPTextModelWithProjection(text).save_pretrained(root / "clip_text")
    files = root / "vocabulary"
    files.mkdir()
    (files / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (files / "merges.txt").write_text("#version: 0.2\n")
    t.CLIPTokenizer(
        vocab=str(files / "vocab.json"), merges=str(files / "merges.txt"), model_max_length=16
    ).save_pretrained(root / "clip_text")  # fmt: skip
    return {name: root / name for name in ("dino", "dinov2", "clip_image", "clip_text")}
