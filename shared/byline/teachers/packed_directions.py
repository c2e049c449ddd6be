"""A wide orthonormal basis in one or two bits per number.

Why it exists: whitened gradients have nearly equal energy in all their coordinates (the largest 4 % of the demo's hold
13 % of it), so none can be left out, and a basis of hundreds of directions over all of them would be hundreds of
megabytes. But many coordinates can each be coarse: the rounding errors of a direction are as good as random, and what
m of them add to an inner product is smaller by sqrt(m) than the vectors. One bit over all coordinates is far
nearer than sixteen bits over a sixteenth of them, for the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from byline.errors import TeacherNotUsable
from byline.teachers.ranking import Check, never_cancelled

#: Coordinates that share a scale, and are unpacked at a time.
BLOCK = 4096
#: Levels and threshold of the best two-bit quantiser of a normal variable (Max 1960), in standard deviations.
_LOW, _HIGH, _THRESHOLD = 0.4528, 1.5104, 0.9816


@dataclass(frozen=True)
class PackedDirections:
    """Directions [m, d] as ``codes``: sign bits, then (of two bits) size bits, uint8 [bits, m, bytes of d];
    or, of sixteen bits, float16 [1, m, d]. ``scales`` float32 [blocks of m, d]."""

    codes: NDArray[np.generic]
    scales: NDArray[np.float32]
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        """(m, d)."""
        return self.codes.shape[1], self.scales.shape[1]

    @classmethod
    def pack(cls, blocks: Iterable[torch.Tensor], bits: int) -> PackedDirections:
        """From the directions, ``BLOCK`` coordinates [BLOCK, d] at a time (the last may be shorter)."""
        if bits not in (1, 2, 16):
            raise TeacherNotUsable(f"a basis is kept in 1, 2 or 16 bits per number, not {bits}")
        codes, scales = [], []
        for block in blocks:
            values = block.float().cpu().numpy()
            if bits == 16:
                codes.append(values.astype(np.float16)[None])
                scales.append(np.ones(values.shape[1], np.float32))
                continue
            planes = [values > 0]
            levels = np.ones_like(values)
            if bits == 2:
                planes.append(np.abs(values) > _THRESHOLD * values.std(axis=0))
                levels = np.where(planes[1], np.float32(_HIGH), np.float32(_LOW))
            # Scaled so that <packed, exact> = <exact, exact> block by block: coarse, but not biased.
            matched = (np.abs(values) * levels).sum(0)
            scales.append(((values**2).sum(0) / np.maximum(matched, np.finfo(np.float32).tiny)).astype(np.float32))
            codes.append(np.stack([np.packbits(plane, axis=1) for plane in planes]))
        return cls(np.concatenate(codes, axis=1), np.stack(scales), bits)

    def block(self, number: int) -> torch.Tensor:
        """The directions at coordinates ``number`` * BLOCK onward, float32 [BLOCK or fewer, d]."""
        codes = self.codes[:, number * BLOCK : (number + 1) * BLOCK]
        if self.bits == 16:
            return torch.from_numpy(codes[0].astype(np.float32))
        planes = np.unpackbits(codes.astype(np.uint8, copy=False), axis=2, count=self.shape[1])
        values = planes[0].astype(np.float32) * 2 - 1
        if self.bits == 2:
            values *= np.where(planes[1] > 0, np.float32(_HIGH), np.float32(_LOW))
        return torch.from_numpy(values * self.scales[number])

    def project(self, values: torch.Tensor) -> torch.Tensor:
        """values [n, m] times the directions: float32 [n, d], on the values' device."""
        total = torch.zeros(len(values), self.shape[1], device=values.device)
        for number in range(len(self.scales)):
            part = values[:, number * BLOCK : (number + 1) * BLOCK].float()
            total += part @ self.block(number).to(values.device)
        return total


def principal_directions(
    rows: NDArray[np.floating], dimensions: int, bits: int, check: Check = never_cancelled
) -> PackedDirections:
    """The leading right singular vectors of ``rows`` [n, m], n some thousands, packed; not centred.

    Through the Gram matrix [n, n], over column blocks of a file that need not fit into memory. No more
    directions than the rows span.
    """
    count, width = rows.shape
    parts = [slice(start, start + BLOCK) for start in range(0, width, BLOCK)]
    gram = torch.zeros(count, count, dtype=torch.float64)
    for part in parts:
        check()
        values = torch.from_numpy(rows[:, part].astype(np.float32))
        gram += values @ values.T
    values, vectors = torch.linalg.eigh(gram)
    spanned = int((values > 1e-7 * values[-1]).sum())
    leading = vectors.flip(1)[:, : min(dimensions, max(spanned, 1))]
    scaled = (leading / values.flip(0)[: leading.shape[1]].clamp_min(1e-300).sqrt()).float()
    return PackedDirections.pack(
        (torch.from_numpy(rows[:, part].astype(np.float32)).T @ scaled for part in parts), bits
    )
