"""Ranking losses behind one interface; in all of them a higher score means more influence.

Why it exists: the published cross-entropy on normalised ranks lets a free slope decide what a high cosine means,
and from its published start the slope often settles on the wrong sign. Here the target is influence itself and the
slope is positive by construction. The listwise loss spends its effort where mAP is decided, at the top of the list.

Every loss here looks at one score per pair, so whichever is chosen, serving is the same inner-product search. The
published ordinal variant is not like that (nine embeddings per image, their cosines squashed one by one before they
are summed); it is kept for comparison only, in ``byline.evaluation.published_ordinal``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from byline.errors import LabelsNotUsable

FloatArray = npt.NDArray[np.float32]


class RankingLoss(nn.Module, ABC):
    """Common part: a positive learned slope on the score. Called with matrices over one batch.

    ``scores`` [b, m] inner products, ``ranks`` [b, m] int (0 = most influential), ``totals`` [b] number of items the
    teacher ranked for the query, ``mask`` [b, m] True where the pair counts, ``weights`` [b, m] ≥ 0 how much it
    counts (None: all the same; see :func:`reliability_weights`). Returns a scalar.
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
    def forward(
        self, scores: Tensor, ranks: Tensor, totals: Tensor, mask: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Mean loss over the pairs (or lists) of the batch."""


class RankCrossEntropy(RankingLoss):
    """``bce_rank``: the published binary cross-entropy, on target = influence = 1 − rank/total."""

    name = "bce_rank"

    def __init__(self, slope: float = 8.0) -> None:
        super().__init__(slope)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(
        self, scores: Tensor, ranks: Tensor, totals: Tensor, mask: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Binary cross-entropy of σ(slope·score + bias) against 1 − rank/total."""
        logits = self.slope * scores + self.bias
        target = influence(ranks, totals, scores.dtype)
        each = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return _mean_over_pairs(each, mask, weights)


class RankSquaredError(RankingLoss):
    """``mse``: squared error of σ(slope·score + bias) on influence = 1 − rank/total.

    The published variant has a free slope and failed (``reference/method.md`` §5.5); this one differs in the sign
    constraint alone.
    """

    name = "mse"

    def __init__(self, slope: float = 8.0) -> None:
        super().__init__(slope)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(
        self, scores: Tensor, ranks: Tensor, totals: Tensor, mask: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Mean squared difference, in [0, 1]."""
        predicted = torch.sigmoid(self.slope * scores + self.bias)
        return _mean_over_pairs((predicted - influence(ranks, totals, scores.dtype)).square(), mask, weights)


class OrdinalThresholds(RankingLoss):
    """``ordinal``: is the influence above each of ten levels? One score and ordered thresholds (cumulative link).

        P(influence > level_j) = σ(slope · score − θ_j),   θ_1 < θ_2 < … < θ_T

    The levels are (j − ½)/T, so that with T = 10 the highest asks for the top twentieth of the ranking. All levels
    share the score, hence one inner-product search serves it: thresholds move where a level begins, never the order.
    The published form gives every level an embedding of its own and sums the sigmoids; its order is that of no inner
    product.
    """

    name = "ordinal"

    def __init__(self, slope: float = 8.0, thresholds: int = 10) -> None:
        super().__init__(slope)
        levels = (torch.arange(thresholds, dtype=torch.float32) + 0.5) / thresholds
        self.register_buffer("levels", levels)
        # Where scores are spread evenly and know nothing, logit(level) is the best θ: a start without a first lurch.
        start = torch.logit(levels)
        self.first = nn.Parameter(start[:1].clone())
        self.raw_gaps = nn.Parameter(torch.log(torch.expm1(start.diff())))

    @property
    def thresholds(self) -> Tensor:
        """θ [T], strictly increasing: gaps are positive by construction."""
        return torch.cat([self.first, self.first + functional.softplus(self.raw_gaps).cumsum(0)])

    def forward(
        self, scores: Tensor, ranks: Tensor, totals: Tensor, mask: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Binary cross-entropy over the levels, their mean."""
        logits = (self.slope * scores)[..., None] - self.thresholds  # [b, m, T]
        levels = self.get_buffer("levels")
        above = (influence(ranks, totals, scores.dtype)[..., None] > levels).to(scores.dtype)
        each = functional.binary_cross_entropy_with_logits(logits, above, reduction="none").mean(2)
        return _mean_over_pairs(each, mask, weights)


class TopWeightedListwise(RankingLoss):
    """``listwise``: cross-entropy of the softmax over candidates against exp(−rank/temperature), normalised.

    The temperature is a number of ranks, and never more than ``LARGEST_SHARE`` of the ranking: among a few hundred
    candidates 100 ranks is nearly all of them, and a head that is told so learns nothing (``byline study pruning``).
    """

    name = "listwise"
    #: Of 0.04 and 0.1 the better one for 251 candidates (docs/studies.md, *pruning*).
    LARGEST_SHARE: ClassVar[float] = 0.1

    def __init__(self, slope: float = 10.0, temperature: float = 100.0) -> None:
        super().__init__(slope)
        self.temperature = temperature

    def forward(
        self, scores: Tensor, ranks: Tensor, totals: Tensor, mask: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Mean over queries; a query without a counted candidate contributes nothing."""
        most = self.LARGEST_SHARE * totals.to(scores.dtype).clamp_min(1.0)
        temperature = most.clamp_max(self.temperature)[:, None]  # [b, 1]
        shares = torch.exp(-ranks.to(scores.dtype) / temperature) * mask.to(scores.dtype)
        if weights is not None:
            shares = shares * weights.to(scores.dtype)
        mass = shares.sum(1, keepdim=True)
        log_share = functional.log_softmax((self.slope * scores).masked_fill(~mask, -1e9), dim=1)
        each = -(shares / mass.clamp_min(1e-12) * log_share).sum(1)
        counted = (mass[:, 0] > 0).to(scores.dtype)
        return (each * counted).sum() / counted.sum().clamp_min(1.0)


LOSSES: dict[str, Callable[[int], RankingLoss]] = {
    RankCrossEntropy.name: lambda top: RankCrossEntropy(),
    RankSquaredError.name: lambda top: RankSquaredError(),
    OrdinalThresholds.name: lambda top: OrdinalThresholds(),
    TopWeightedListwise.name: lambda top: TopWeightedListwise(temperature=float(top)),
}


def make_loss(name: str, top: int = 100) -> RankingLoss:
    """The loss registered under ``name``, for a head that is judged by mAP(``top``).

    Raises LabelsNotUsable naming the known losses.
    """
    if name not in LOSSES:
        raise LabelsNotUsable(f"unknown loss {name!r}; known: {', '.join(sorted(LOSSES))}", loss=name)
    return LOSSES[name](top)


def influence(ranks: Tensor, totals: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normalised influence [b, m] in [0, 1]: 1 for rank 0, 0 for an item beyond the ranking."""
    return (1.0 - ranks.to(dtype) / totals.to(dtype).clamp_min(1.0)[:, None]).clamp(0.0, 1.0)


def reliability_weights(tau: FloatArray, standard_error: FloatArray) -> FloatArray:
    """How far each label can be trusted, [q, n] with mean 1 per query: s² / (s² + error²), 0 where not scored.

    s² is what is left of the variance of the query's τ when the mean squared error is taken away, so that a query
    whose labels are all noise weighs its pairs alike instead of by chance.
    """
    scored = ~np.isnan(tau)
    count = np.maximum(scored.sum(1, keepdims=True), 1)
    error = np.where(scored, np.square(np.nan_to_num(standard_error.astype(np.float64))), 0.0)
    values = np.where(scored, tau, 0.0).astype(np.float64)
    mean = values.sum(1, keepdims=True) / count
    variance = np.where(scored, np.square(values - mean), 0.0).sum(1, keepdims=True) / count
    # Never below a hundredth of what is seen: beyond that the subtraction says nothing any more.
    signal = np.maximum(variance - error.sum(1, keepdims=True) / count, 0.01 * variance) + 1e-300
    weights = np.where(scored, signal / (signal + error), 0.0)
    total = np.maximum(weights.sum(1, keepdims=True), 1e-300)
    return np.asarray(weights * count / total, dtype=np.float32)


def _mean_over_pairs(each: Tensor, mask: Tensor, weights: Tensor | None) -> Tensor:
    counted = mask.to(each.dtype) if weights is None else mask.to(each.dtype) * weights.to(each.dtype)
    # Divided by the weights themselves, so that all of them doubled change nothing; nothing counted gives zero.
    return (each * counted).sum() / counted.sum().clamp_min(1e-12)
