"""Noise and timesteps as a pure function of what they are for.

Why it exists: the published teacher seeds its noise by the position of a batch, so a score depends
on batch size and order, baselines cannot be cached, and a run cannot resume. Here a draw is keyed
by (seed, key, index) through a counter-based generator (Philox), whoever asks and in which order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from byline.errors import TeacherNotUsable


@dataclass(frozen=True)
class NoiseScheme:
    """Which noise a loss is averaged over.

    ``kind``: ``item`` gives every item noise of its own; ``shared`` gives all items one common set,
    worth about 1.3 times more draws for a ranking since what is common cancels (measured, C3).
    Never share it between query and items: that is self-consistent and biased (C3).
    ``antithetic`` draws come in pairs (2j, 2j + 1): one timestep, noise eps and -eps.
    ``replicates`` split the draws (or pairs) round-robin, see ``replicate_of``; each of them is
    stratified over all timesteps.
    """

    kind: Literal["item", "shared"]
    seed: int
    draws: int
    replicates: int = 8
    antithetic: bool = False

    def __post_init__(self) -> None:
        """Raises TeacherNotUsable when the draws do not fall into equal replicates (of whole pairs)."""
        unit = self.replicates * (2 if self.antithetic else 1)
        if self.replicates < 1 or self.draws < 1 or self.draws % unit:
            what = "2 x replicates, as antithetic draws come in pairs" if self.antithetic else "replicates"
            raise TeacherNotUsable(
                f"{self.draws} draws do not split into {self.replicates} equal replicates: "
                f"choose a multiple of {what} ({unit})"
            )

    @property
    def name(self) -> str:
        """Stable text for a teacher id, and for what is cached under this noise."""
        return f"{self.kind}-{self.seed}-{self.draws}x{self.replicates}{'-antithetic' if self.antithetic else ''}"

    @property
    def draws_per_replicate(self) -> int:
        """How many draws one replicate has."""
        return self.draws // self.replicates

    def replicate_of(self, draw: int) -> int:
        """The replicate a draw belongs to. A pair stays together, so that replicates are independent."""
        return (draw // 2 if self.antithetic else draw) % self.replicates

    def draws_of(self, replicate: int) -> tuple[int, ...]:
        """The draws of one replicate, by increasing timestep."""
        return tuple(draw for draw in range(self.draws) if self.replicate_of(draw) == replicate)

    def key(self, item_id: int, caption: str, flipped: bool = False) -> str:
        """The key of one item's noise: item, caption and orientation, or nothing when shared."""
        if self.kind == "shared":
            return "shared"
        return item_key(item_id, caption, flipped)

    def draw(
        self, key: str, indices: Sequence[int], shape: tuple[int, ...], num_timesteps: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps int64 [k] and noise float32 [k, *shape] of draws ``indices`` for ``key``.

        Draw d (or pair d // 2) falls into the d-th of equal strata of [0, num_timesteps):
        stratification takes the largest part of the variance, that between timesteps, out of the mean.
        """
        timesteps = np.empty(len(indices), dtype=np.int64)
        noise = np.empty((len(indices), *shape), dtype=np.float32)
        strata = self.draws // 2 if self.antithetic else self.draws
        for row, index in enumerate(indices):
            counter = index // 2 if self.antithetic else index
            digest = hashlib.blake2b(f"byline/{self.seed}/{key}/{counter}".encode(), digest_size=16).digest()
            generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
            timesteps[row] = int((counter + generator.random()) * num_timesteps / strata)
            noise[row] = generator.standard_normal(shape, dtype=np.float32)
            if self.antithetic and index % 2:
                noise[row] = -noise[row]
        return torch.from_numpy(timesteps), torch.from_numpy(noise)


def item_key(item_id: int, caption: str, flipped: bool = False) -> str:
    """One (item, caption, orientation), as a text that never changes."""
    digest = hashlib.blake2b(caption.encode(), digest_size=8).hexdigest()
    return f"{item_id}/{digest}/{'flipped' if flipped else 'upright'}"
