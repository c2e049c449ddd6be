"""Mean loss gradients of corpus items per replicate of their noise, without a gradient per draw.

Why it exists: the first-order teacher, its sketches and the random projections all start from the same quantity, and
it is where their time goes. A layer's gradient is a sum over draws and tokens of (output gradient) x (input)^T, so the
draws of one item and replicate are one matrix product, and what weighs a draw (``aggregation``) weighs its output
gradients. Layers that read the text states alone have one input for all draws: their output gradients are summed over
the draws first and multiplied out once, when somebody asks (reference/peers.md 4.2).

Aggregation over timesteps is that of the rise tau, to first order: ``sum`` is the mean over draws of L' - L, ``skew``
of (L' - L) / (L' + L), whose derivative is that of L divided by 2 L; ``unit`` gives every draw's gradient, over all
the layers at hand, Frobenius norm one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from byline.diffusion.model import DiffusionModel
from byline.errors import TeacherNotUsable
from byline.teachers.latents import LatentCache
from byline.teachers.layers import Capture, EditableLayer, capture
from byline.teachers.noise import NoiseScheme
from byline.teachers.ranking import Check, TeacherItem, never_cancelled

#: Whose gradient: the denoising loss, or the mean of squares of the UNet's output (D-TRAK).
Objective = Literal["denoising", "output_norm"]
Aggregation = Literal["sum", "skew", "unit"]


@dataclass
class GradientBlock:
    """Gradients of a few items, mean over each replicate's draws, multiplied out one layer at a time.

    ``names`` are the layers'; ``count`` items n, ``replicates`` r.
    """

    names: tuple[str, ...]
    count: int
    replicates: int
    _inputs: dict[str, torch.Tensor] = field(default_factory=dict)  # [n, tokens, columns]
    _input_of: dict[str, str] = field(default_factory=dict)
    _deltas: dict[str, torch.Tensor] = field(default_factory=dict)  # [n * r, tokens, rows]
    _matrices: dict[str, torch.Tensor] = field(default_factory=dict)  # [n * r, rows, columns]

    def replicate_gradients(self, name: str) -> torch.Tensor:
        """[n, r, rows, columns] of one layer."""
        if name in self._matrices:
            held: torch.Tensor = self._matrices[name].unflatten(0, (self.count, self.replicates))
            return held
        deltas = self._deltas[name].unflatten(0, (self.count, self.replicates))
        found: torch.Tensor = torch.einsum("nrto,nti->nroi", deltas, self._inputs[self._input_of[name]])
        return found

    def gradients(self, name: str) -> torch.Tensor:
        """[n, rows, columns] of one layer, mean over replicates."""
        if name in self._matrices:
            return self.replicate_gradients(name).mean(1)
        deltas = self._deltas[name].unflatten(0, (self.count, self.replicates)).mean(1)
        found: torch.Tensor = torch.einsum("nto,nti->noi", deltas, self._inputs[self._input_of[name]])
        return found

    def of_tokens(self, names: Sequence[str]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Output gradients [n, tokens, rows] of each of these layers, mean over replicates, and the one input of all of
        them [n, tokens, columns]. TeacherNotUsable as ``token_gradients``."""
        if self._matrices or len(set(self._input_of.values())) != 1:
            raise TeacherNotUsable(
                "only layers that all read the same text states have token gradients: choose cross_attention_kv"
            )
        deltas = [self._deltas[name].unflatten(0, (self.count, self.replicates)).mean(1) for name in names]
        return deltas, self._inputs[self._input_of[names[0]]]

    def token_gradients(self) -> torch.Tensor:
        """Mean output gradients of all layers, stacked along their rows: [n, tokens, sum of rows].

        For layers that read the same text and nothing else; raises TeacherNotUsable for others, whose
        gradients are no sum over tokens with one input.
        """
        held, _ = self.of_tokens(self.names)
        return torch.cat(held, dim=2)


class ItemGradients:
    """Gradients of items under one noise scheme. Stateless but for caches of latents and common noise.

    ``batch`` samples share a forward and backward pass. ``autocast`` runs them in bfloat16 and sums in float32; off by
    default. Results do not depend on ``batch`` beyond rounding.
    """

    def __init__(
        self,
        model: DiffusionModel,
        layers: dict[str, EditableLayer],
        scheme: NoiseScheme,
        batch: int = 128,
        aggregation: Aggregation = "sum",
        objective: Objective = "denoising",
        *,
        autocast: bool = False,
    ) -> None:
        """Nothing is computed."""
        self.model = model
        self.layers = layers
        self.scheme = scheme
        self.aggregation = aggregation
        self.objective = objective
        self.autocast = autocast
        # All pieces of a batch have equally many draws, so that they are one batched product.
        whole = scheme.draws_per_replicate
        self._piece = max(size for size in range(1, whole + 1) if whole % size == 0 and size <= max(batch, 1))
        self._pieces = max(1, batch // self._piece)
        self._latents = LatentCache(model)
        self._common: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def dense(self, items: Sequence[TeacherItem], flipped: bool = False) -> dict[str, torch.Tensor]:
        """Per layer the gradients [n, replicates, rows, columns] of ``items``, mean over each replicate's draws."""
        block = self.block(items, flipped)
        return {name: block.replicate_gradients(name) for name in self.layers}

    def bytes_per_item(self) -> int:
        """Memory of one item in a block and of its largest layer once multiplied out."""
        tokens = self.model.encode_prompts([""]).shape[1]
        replicates = self.scheme.replicates
        text = [layer for layer in self.layers.values() if layer.reads_text]
        dense = [layer for layer in self.layers.values() if not layer.reads_text]
        numbers = sum(tokens * layer.rows * replicates for layer in text)
        numbers += max((layer.rows * layer.columns * replicates for layer in text), default=0)
        numbers += sum(layer.rows * layer.columns * replicates for layer in dense)
        numbers += max((tokens * layer.columns for layer in text), default=0)
        return 4 * (numbers + 2 * math.prod(self.model.latent_shape))

    def block(
        self,
        items: Sequence[TeacherItem],
        flipped: bool = False,
        *,
        key: str | None = None,
        check: Check = never_cancelled,
    ) -> GradientBlock:
        """Gradients of ``items``, mirrored when ``flipped``. ``key``: one noise key for all of them.

        ``check`` is called before every forward pass and may raise.
        """
        scheme, device = self.scheme, self.model.device
        latents = self._latents.encode(items, flipped)
        states = self.model.encode_prompts([item.caption for item in items])
        keys = [key or scheme.key(item.item_id, item.caption, flipped) for item in items]
        common = key is not None or scheme.kind == "shared"
        block = GradientBlock(tuple(self.layers), len(items), scheme.replicates)
        pieces = [
            (row, replicate, draws[start : start + self._piece])
            for row in range(len(items))
            for replicate in range(scheme.replicates)
            for draws in [scheme.draws_of(replicate)]
            for start in range(0, len(draws), self._piece)
        ]
        for start in range(0, len(pieces), self._pieces):
            check()
            part = pieces[start : start + self._pieces]
            rows = torch.tensor([row for row, _, _ in part], device=device)
            cells = torch.tensor([row * scheme.replicates + replicate for row, replicate, _ in part], device=device)
            timesteps, noise = self._noise([(keys[row], draws) for row, _, draws in part], common)
            samples = rows.repeat_interleave(self._piece)
            self._add(block, rows, cells, latents[samples], states[samples], timesteps, noise)
        return block

    def _noise(self, wanted: list[tuple[str, tuple[int, ...]]], common: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps [k] and noise [k, c, h, w] of all draws wanted, in order, on the device."""
        parts = []
        for key, draws in wanted:
            if common:
                timesteps, noise = self._common_noise(key)
                parts.append((timesteps[list(draws)], noise[list(draws)]))
            else:
                parts.append(self.scheme.draw(key, draws, self.model.latent_shape, self.model.num_timesteps))
        device = self.model.device
        return torch.cat([t for t, _ in parts]).to(device), torch.cat([n for _, n in parts]).to(device)

    def _common_noise(self, key: str) -> tuple[torch.Tensor, torch.Tensor]:
        """All draws of a key that every item has, drawn once."""
        if key not in self._common:
            timesteps, noise = self.scheme.draw(
                key, range(self.scheme.draws), self.model.latent_shape, self.model.num_timesteps
            )
            self._common[key] = timesteps.to(self.model.device), noise.to(self.model.device)
        return self._common[key]

    def _add(
        self,
        block: GradientBlock,
        rows: torch.Tensor,
        cells: torch.Tensor,
        latents: torch.Tensor,
        states: torch.Tensor,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
    ) -> None:
        """Run one batch of pieces [k x draws] and add their means to ``cells`` [k] of the block."""
        kind = torch.device(self.model.device).type
        mixed: Any = torch.autocast(kind, torch.bfloat16) if self.autocast else nullcontext()
        with mixed, capture(self.layers) as record:
            losses = self._losses(latents, states, timesteps, noise)
            deltas = {n: d.float() for n, d in record.gradients(losses).items()}
        weights = self._weights(losses.detach().float(), record, deltas) / self.scheme.draws_per_replicate
        seen: dict[int, tuple[str, torch.Tensor]] = {}
        for name, delta in deltas.items():
            pieces = (delta * weights[:, None, None]).unflatten(0, (-1, self._piece))  # [k, draws, tokens, rows]
            if self.layers[name].reads_text:
                tokens = record.inputs[name]
                first, _ = seen.setdefault(tokens.data_ptr(), (name, tokens))
                block._input_of.setdefault(name, first)
                if block._input_of[name] == name:
                    held = _grown(block._inputs, name, block.count, tokens.shape[1:], tokens.device)
                    held[rows] = tokens[:: self._piece].float()
                summed = pieces.sum(1)
                held = _grown(block._deltas, name, block.count * block.replicates, summed.shape[1:], summed.device)
                held.index_add_(0, cells, summed)
            else:
                inputs = record.inputs[name].float().unflatten(0, (-1, self._piece)).flatten(1, 2)
                gradient = torch.bmm(pieces.flatten(1, 2).transpose(1, 2), inputs)  # [k, rows, columns]
                shape = gradient.shape[1:]
                held = _grown(block._matrices, name, block.count * block.replicates, shape, gradient.device)
                held.index_add_(0, cells, gradient)

    def _losses(
        self, latents: torch.Tensor, states: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """The objective of every sample, [batch]."""
        if self.objective == "denoising":
            return self.model.denoising_loss(latents, states, timesteps, noise)
        output = self.model.predict(self.model.add_noise(latents, noise, timesteps), timesteps, states)
        return output.float().pow(2).flatten(1).mean(1)

    def _weights(self, losses: torch.Tensor, record: Capture, deltas: dict[str, torch.Tensor]) -> torch.Tensor:
        """What each draw's gradient counts, [batch]; see the module."""
        if self.aggregation == "sum":
            return torch.ones_like(losses)
        if self.aggregation == "skew":
            return 0.5 / losses.clamp_min(torch.finfo(losses.dtype).tiny)
        squares = torch.zeros_like(losses)
        for name, delta in deltas.items():
            squares += _squared_norms(delta, record.inputs[name].float())
        return squares.clamp_min(torch.finfo(losses.dtype).tiny).rsqrt()


def _squared_norms(deltas: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """|sum over tokens of delta a^T|^2 of every sample [batch], by whichever product is smaller.

    deltas [batch, tokens, rows], inputs [batch, tokens, columns]. Through the tokens' Gram matrices no
    matrix of weights is made: |D^T A|^2 = sum of (D D^T) * (A A^T).
    """
    tokens, rows, columns = deltas.shape[1], deltas.shape[2], inputs.shape[2]
    if tokens * (rows + columns) <= rows * columns:
        return ((deltas @ deltas.transpose(1, 2)) * (inputs @ inputs.transpose(1, 2))).sum((1, 2))
    return torch.bmm(deltas.transpose(1, 2), inputs).pow(2).sum((1, 2))


def _grown(
    held: dict[str, torch.Tensor], name: str, count: int, shape: Sequence[int], device: torch.device
) -> torch.Tensor:
    """The tensor ``name``, made of zeros [count, *shape] when it is not there yet."""
    if name not in held:
        held[name] = torch.zeros(count, *shape, device=device)
    return held[name]
