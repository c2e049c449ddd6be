"""Denoising losses of many items at once, to the bit the same however the work is cut.

Why it exists: the exact teacher is a difference of two nearly equal losses. Both must see the same
latent, text states and noise (made once for both), in full float32, and neither may depend on which
other items shared the UNet's batch: baselines are cached, races drop candidates, runs are killed.

So every image and caption is encoded alone, every call of the UNet has exactly ``batch`` rows (the
last one is filled up), and the squared error is averaged in float64: the difference of two losses
is far smaller than either.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from byline.diffusion.model import DiffusionModel
from byline.teachers.baselines import CellKey
from byline.teachers.item_gradients import Objective
from byline.teachers.noise import NoiseScheme, item_key
from byline.teachers.ranking import TeacherItem

#: Bytes of latents, and as many of text states, kept in memory.
KEPT_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Cell:
    """The unit of work: one orientation of an item over the draws of one replicate."""

    item: TeacherItem
    flipped: bool
    replicate: int

    @property
    def key(self) -> CellKey:
        """What its losses are kept under."""
        return item_key(self.item.item_id, self.item.caption, self.flipped), self.replicate


class ItemLosses:
    """Losses of cells under one or several sets of weights."""

    def __init__(
        self, model: DiffusionModel, scheme: NoiseScheme, batch: int, objective: Objective = "denoising"
    ) -> None:
        """``batch``: rows of a UNet call; another batch may change the last bits of a loss. ``objective``: what
        is called loss here, see ``UnlearningSettings``."""
        self.objective = objective
        self.model = model
        self.scheme = scheme
        self.batch = batch
        self._latents = _Recent(KEPT_BYTES)
        self._states = _Recent(KEPT_BYTES)
        self._shared: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def cells_per_call(self) -> int:
        """How many cells fill a call of the UNet: the chunk that wastes least."""
        return max(1, self.batch // self.scheme.draws_per_replicate)

    @torch.no_grad()
    def measure(
        self, cells: Sequence[Cell], weights: Sequence[Mapping[str, torch.Tensor]], fill: bool = True
    ) -> NDArray[np.float64]:
        """Losses [weights, cells, draws of a replicate].

        ``weights``: for each pass the parameters that differ from the model's, by full name; {} is the
        model itself. ``fill=False`` spares the filling up where a call need not agree with another.
        """
        if not cells:
            return np.empty((len(weights), 0, self.scheme.draws_per_replicate))
        model, width = self.model, self.scheme.draws_per_replicate
        states = torch.stack([self._state(cell.item.caption) for cell in cells])
        latents = torch.stack([self._latent(cell) for cell in cells])
        losses = np.empty((len(weights), len(cells) * width))
        for start in range(0, losses.shape[1], self.batch):
            rows = np.arange(start, min(start + self.batch, losses.shape[1]))
            padded = np.concatenate([rows, np.full(self.batch - len(rows), rows[0])]) if fill else rows
            index = torch.from_numpy(padded // width).to(model.device)
            timesteps, noise = self._noise(cells, rows)
            if fill:
                again = torch.from_numpy(padded - start)
                timesteps, noise = timesteps[again], noise[again]
            timesteps, noise, clean = timesteps.to(model.device), noise.to(model.device), latents[index]
            noisy, target = model.add_noise(clean, noise, timesteps), model.target(clean, noise, timesteps)
            for number, parameters in enumerate(weights):
                with full_precision(model.device):
                    output = torch.func.functional_call(
                        model.unet,
                        dict(parameters),
                        (noisy, timesteps),
                        {"encoder_hidden_states": states[index], "return_dict": False},
                    )[0]
                error = (output if self.objective == "output_norm" else output - target)[: len(rows)].double()
                losses[number, rows] = error.pow(2).flatten(1).mean(1).cpu().numpy()
        return losses.reshape(len(weights), len(cells), width)

    def _noise(self, cells: Sequence[Cell], rows: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps [rows] and noise [rows, c, h, w] of rows of the (cell, draw) table."""
        width = self.scheme.draws_per_replicate
        timesteps, noise = [], []
        for position in range(rows[0] // width, rows[-1] // width + 1):
            wanted = rows[rows // width == position] % width
            drawn = self._cell_noise(cells[position])
            timesteps.append(drawn[0][wanted])
            noise.append(drawn[1][wanted])
        return torch.cat(timesteps), torch.cat(noise)

    def _cell_noise(self, cell: Cell) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps and noise of a cell's draws; common noise is made once."""
        if cell.replicate in self._shared:
            return self._shared[cell.replicate]
        key = self.scheme.key(cell.item.item_id, cell.item.caption, cell.flipped)
        draws = self.scheme.draws_of(cell.replicate)
        drawn = self.scheme.draw(key, draws, self.model.latent_shape, self.model.num_timesteps)
        if self.scheme.kind == "shared":
            self._shared[cell.replicate] = drawn
        return drawn

    def _state(self, caption: str) -> torch.Tensor:
        """Text states [tokens, dim] of one caption, encoded alone."""
        found = self._states.get(caption)
        return self._states.put(caption, self.model.encode_prompts([caption])[0]) if found is None else found

    def _latent(self, cell: Cell) -> torch.Tensor:
        """Latent [c, h, w] of one orientation. Only corpus items, whose ids are not negative, are remembered."""
        key = f"{cell.item.item_id}/{cell.flipped}"
        found = self._latents.get(key)
        if found is not None:
            return found
        image = cell.item.image
        if cell.flipped:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        latent = self.model.encode_images([image])[0]
        return self._latents.put(key, latent) if cell.item.item_id >= 0 else latent


@contextmanager
def full_precision(device: str) -> Iterator[None]:
    """float32 as float32: no TF32 in matrix products or convolutions, no autocast."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    cudnn = torch.backends.cudnn
    convolutions = cudnn.flags(
        enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic,
        allow_tf32=False, fp32_precision="ieee",
    )  # fmt: skip
    try:
        with convolutions, torch.autocast(torch.device(device).type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Recent:
    """Tensors by name, the least recently used dropped beyond ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = 0
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()

    def get(self, name: str) -> torch.Tensor | None:
        if name in self._kept:
            self._kept.move_to_end(name)
        return self._kept.get(name)

    def put(self, name: str, value: torch.Tensor) -> torch.Tensor:
        value = value.clone()  # a row of a larger tensor would keep all of it alive
        self._kept[name] = value
        self._bytes += value.nbytes
        while self._bytes > self._limit and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return value
