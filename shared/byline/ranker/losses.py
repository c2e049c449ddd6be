"""Ranking losses behind one interface; in all of them a higher score means more influence.

Why it exists: the published cross-entropy on normalised ranks lets a free slope decide what a high cosine means,
and from its published start the slope often settles on the wrong sign. Here the target is influence itself and the
slope is positive by construction. The listwise loss spends its effort where mAP is decided, at the top of the list.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from byline.errors import LabelsNotUsable


class RankingLoss(nn.Module, ABC):
    """Common part: a positive learned slope on the score. Called with matrices over one batch.

    ``scores`` [b, m] inner products, ``ranks`` [b, m] int (0 = most influential), ``totals`` [b] number of items the
    teacher ranked for the query, ``mask`` [b, m] True where the pair counts. Returns a scalar.
    """

    name: ClassVar[str]

    def __init__(self, slope: float) -> None:
        super().__init__()
        # softplus⁻¹, so that the slope starts at the value asked for and can never reach zero or below.
        self.raw_slope = nn.Parameter(torch.tensor(math.log(math.expm1(slope))))

    @property
    def slope(self) -> Tensor:
        """The factor on the score, always > 0."""
        return functional.softplus(self.raw_slope)

    @abstractmethod
    def forward(self, scores: Tensor, ranks: Tensor, totals: Tensor, mask: Tensor) -> Tensor:
        """Mean loss over the pairs (or lists) of the batch."""


class RankCrossEntropy(RankingLoss):
    """``bce_rank``: the published binary cross-entropy, on target = influence = 1 − rank/total."""

    name = "bce_rank"

    def __init__(self, slope: float = 8.0) -> None:
        super().__init__(slope)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, scores: Tensor, ranks: Tensor, totals: Tensor, mask: Tensor) -> Tensor:
        """Binary cross-entropy of σ(slope·score + bias) against 1 − rank/total."""
        target = 1.0 - ranks.to(scores.dtype) / totals.to(scores.dtype).clamp_min(1.0)[:, None]
        logits = self.slope * scores + self.bias
        each = functional.binary_cross_entropy_with_logits(logits, target.clamp(0.0, 1.0), reduction="none")
        weights = mask.to(scores.dtype)
        return (each * weights).sum() / weights.sum().clamp_min(1.0)


class TopWeightedListwise(RankingLoss):
    """``listwise``: cross-entropy of the softmax over candidates against exp(−rank/temperature), normalised."""

    name = "listwise"

    def __init__(self, slope: float = 10.0, temperature: float = 100.0) -> None:
        super().__init__(slope)
        self.temperature = temperature

    def forward(self, scores: Tensor, ranks: Tensor, totals: Tensor, mask: Tensor) -> Tensor:
        """Mean over queries; a query without a counted candidate contributes nothing."""
        weights = torch.exp(-ranks.to(scores.dtype) / self.temperature) * mask.to(scores.dtype)
        mass = weights.sum(1, keepdim=True)
        log_share = functional.log_softmax((self.slope * scores).masked_fill(~mask, -1e9), dim=1)
        each = -(weights / mass.clamp_min(1e-12) * log_share).sum(1)
        counted = (mass[:, 0] > 0).to(scores.dtype)
        return (each * counted).sum() / counted.sum().clamp_min(1.0)


LOSSES: dict[str, Callable[[int], RankingLoss]] = {
    RankCrossEntropy.name: lambda top: RankCrossEntropy(),
    TopWeightedListwise.name: lambda top: TopWeightedListwise(temperature=float(top)),
}


def make_loss(name: str, top: int = 100) -> RankingLoss:
    """The loss registered under ``name``, for a head that is judged by mAP(``top``).

    Raises LabelsNotUsable naming the known losses.
    """
    if name not in LOSSES:
        raise LabelsNotUsable(f"unknown loss {name!r}; known: {', '.join(sorted(LOSSES))}", loss=name)
    return LOSSES[name](top)
