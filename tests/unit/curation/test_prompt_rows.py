"""Prompts are encoded once in all, and their rows are on disk and not in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from services.curation.generate import PromptRows


class Counting:
    """An encoder of lengths that notes what it was asked to encode."""

    name = "minilm"
    dim = 2
    modality: Literal["text"] = "text"
    preprocessing_hash = "0" * 16

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def encode(self, images: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
        self.encoded += texts
        return np.array([[len(text), 1.0] for text in texts], dtype=np.float32)


def test_no_prompt_is_encoded_twice_however_many_there_are_and_whoever_comes_after(tmp_path: Path) -> None:
    prompts = [f"{'x' * (number % 7)} {number}" for number in range(3000)]
    encoder = Counting()
    rows = PromptRows(encoder, tmp_path, "toy")
    found = rows([*prompts, prompts[0]])
    assert sorted(encoder.encoded) == sorted(prompts)
    assert rows(prompts[::-1]).tolist() == found[-2::-1].tolist()
    restarted = PromptRows(encoder, tmp_path, "toy")
    assert restarted(prompts[:50]).tolist() == found[:50].tolist() and len(encoder.encoded) == 3000
    assert np.allclose(np.linalg.norm(found, axis=1), 1.0) and np.isclose(found[0, 0] / found[0, 1], len(prompts[0]))
