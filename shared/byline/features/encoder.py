"""What an encoder is, and the pieces all of them share.

Why it exists: nothing outside this package knows which network makes a feature. An encoder is a name, a
width and a function; its hash says whether two outputs may be compared at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

Features = NDArray[np.float32]
Modality = Literal["image", "text", "pair"]

#: Rows encoded at once; small enough for a CPU's cache, large enough for a GPU.
BATCH = 32


class Encoder(Protocol):
    """A frozen network from images, texts or pairs of both to one vector each."""

    @property
    def name(self) -> str:
        """Its name in the registry."""

    @property
    def dim(self) -> int:
        """Width of its output."""

    @property
    def modality(self) -> Modality:
        """What it looks at; the other argument of ``encode`` is ignored."""

    @property
    def preprocessing_hash(self) -> str:
        """16 hex digits over preprocessing and weights: outputs are comparable only where this is equal."""

    def encode(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Features:
        """Features [n, dim] float32 of n pairs; a row does not depend on the others beyond float rounding."""


def identity_hash(**parts: object) -> str:
    """16 hex digits of the sha256 over named parts."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_hash(module: torch.nn.Module) -> str:
    """16 hex digits of the sha256 over names, shapes and values of all weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def freeze(module: Any, device: str) -> Any:
    """The module in evaluation mode, without gradients, in float32, on the device."""
    return module.eval().requires_grad_(False).float().to(device)


def batches(count: int, size: int = BATCH) -> Iterator[slice]:
    """Slices that cover ``count`` rows."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def stack(rows: Iterable[torch.Tensor], dim: int) -> Features:
    """Concatenate batches [b, dim] into one float32 array; [0, dim] when there are none."""
    parts = [part.detach().float().cpu().numpy() for part in rows]
    return np.concatenate(parts).astype(np.float32, copy=False) if parts else np.empty((0, dim), dtype=np.float32)
