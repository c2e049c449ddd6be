"""Gradient features without the gradients: everything linear in a row of operations, multiplied out beforehand.

Why it exists: of the time of a ``gradient`` feature a third went into preconditioning whole gradient matrices. Layers
that read the text alone have gradients D^T X with one X for all of them (output gradients D [tokens, rows], text
states X [tokens, columns]), and one activation factor U. Then

    P^T Q^T [U_l ((U_l^T D_l^T X U) / S_l) U^T]  =  (P U)^T sum_l (Q_l^T U_l) (((D_l U_l)^T (X U)) / S_l)

so X U is made once instead of once a layer, and what surrounds the division is two fixed matrices: five times fewer
multiplications, the same numbers but for rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from byline.teachers.curvature import Curvature
from byline.teachers.gradient_basis import GradientBasis
from byline.teachers.item_gradients import GradientBlock


@dataclass(frozen=True)
class FoldedFeatures:
    """``rotate`` per layer [rows, rows], ``scale`` [R, columns] over the stacked rows, ``turn`` [columns, columns],
    ``map`` [r, R] and ``directions`` [d, r x columns]."""

    layers: tuple[str, ...]
    rotate: tuple[torch.Tensor, ...]
    scale: torch.Tensor
    turn: torch.Tensor
    map: torch.Tensor
    directions: torch.Tensor

    @classmethod
    def of(cls, basis: GradientBasis, curvature: Curvature, directions: torch.Tensor) -> FoldedFeatures | None:
        """None where the layers do not share their activation factor. ``directions`` as ``basis.directions()``."""
        factors = [curvature.layers[name] for name in basis.layers]
        turn = factors[0].activation
        if any(one.activation.shape != turn.shape or not torch.equal(one.activation, turn) for one in factors):
            return None
        damping = basis.settings.damping
        maps = basis.query_map.to(turn).split([one.gradient.shape[0] for one in factors])
        columns = turn.shape[0]
        turned = directions.to(turn).unflatten(1, (-1, columns)) @ turn
        return cls(
            basis.layers, tuple(one.gradient for one in factors),
            torch.cat([1 / one.damped(damping) for one in factors]), turn,
            torch.cat([part.T @ one.gradient for part, one in zip(maps, factors, strict=True)], dim=1),
            turned.flatten(1).contiguous(),
        )  # fmt: skip

    def features(self, block: GradientBlock) -> torch.Tensor:
        """[n, d] of the items of a block. TeacherNotUsable if a layer reads something else than the text."""
        deltas, inputs = block.of_tokens(self.layers)
        turned = inputs @ self.turn  # [n, tokens, columns]
        rotated = torch.cat([delta @ u for delta, u in zip(deltas, self.rotate, strict=True)], dim=2)
        natural = torch.bmm(rotated.transpose(1, 2), turned).mul_(self.scale)  # [n, R, columns]
        return functional.linear((self.map @ natural).flatten(1), self.directions)
