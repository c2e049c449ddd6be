"""A seeded sparse Johnson-Lindenstrauss projection of per-layer gradients.

Why it exists: TRAK compares gradients after a random projection to p dimensions. The libraries that do it well need
a CUDA kernel; on a CPU they make the dense matrix of parameters x p in blocks. Here every coordinate
goes, with a random sign, into one of p / s buckets in each of s blocks (Kane & Nelson, 2014):

    (S x)[block k, h_k(j)] += sign_k(j) x_j / sqrt(s),      E <S x, S y> = <x, y>

at s additions per coordinate and s small integers of memory for each, with the error of a dense projection:
the standard deviation of <S x, S y> is about |x| |y| / sqrt(p).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from byline.errors import TeacherNotUsable

#: Coordinates moved at once: bounds the copy that is made of the gradients.
_BLOCK = 1 << 16


class SparseProjection:
    """From gradients per layer to ``dimensions`` numbers; a function of the seed and the layers' names and shapes."""

    def __init__(self, dimensions: int = 2048, copies: int = 4, seed: int = 0) -> None:
        """``copies`` (s above) must divide ``dimensions``; TeacherNotUsable otherwise."""
        if copies < 1 or dimensions < copies or dimensions % copies:
            raise TeacherNotUsable(f"{dimensions} dimensions do not split into {copies} blocks; choose a multiple")
        self.dimensions = dimensions
        self.copies = copies
        self.seed = seed
        self._tables: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def name(self) -> str:
        """Stable text for a teacher id."""
        return f"sparse-{self.dimensions}x{self.copies}-{self.seed}"

    def __call__(self, gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Project gradients {layer: [..., rows, columns]}, summed over layers; float32 [..., dimensions].

        A row of the result does not depend on the other rows.
        """
        shape = next(iter(gradients.values())).shape[:-2]
        device = next(iter(gradients.values())).device
        out = torch.zeros(self.dimensions, shape.numel(), device=device)  # [p, m]
        for layer, gradient in gradients.items():
            flat = gradient.reshape(shape.numel(), -1)  # [m, coordinates]
            buckets, signs = self._table(layer, flat.shape[1])
            for start in range(0, flat.shape[1], _BLOCK):
                part = slice(start, start + _BLOCK)
                values = flat[:, part].T.float().contiguous()  # [block, m]
                for copy in range(self.copies):
                    sign = signs[copy, part].to(device, torch.float32)[:, None]
                    out.index_add_(0, buckets[copy, part].to(device, torch.int64), values * sign)
        projected: torch.Tensor = (out.T / self.copies**0.5).reshape(*shape, self.dimensions).contiguous()
        return projected

    def _table(self, layer: str, coordinates: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Bucket int32 and sign int8 of each copy and coordinate of a layer, [copies, coordinates] each."""
        key = (layer, coordinates)
        if key not in self._tables:
            digest = hashlib.blake2b(f"{self.seed}/{layer}/{coordinates}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            width, shape = self.dimensions // self.copies, (self.copies, coordinates)
            buckets = torch.randint(width, shape, generator=generator, dtype=torch.int32)
            buckets += width * torch.arange(self.copies, dtype=torch.int32)[:, None]
            signs = torch.randint(2, shape, generator=generator, dtype=torch.int8) * 2 - 1
            self._tables[key] = (buckets, signs)
        return self._tables[key]
