"""The published ordinal variant: nine thresholds with an embedding each, for the study of losses only.

Why it exists: the published ablation has one loss that is slightly better than cross-entropy, and it is not one that
can be served. From the facts in ``reference/method.md`` §5.5: the range of ranks is cut into ten equal bins; for each
of the nine borders t there is an embedding of its own, and

    P(bin > t) = σ(α_t cos(e_t(query), e_t(item)) + β_t),   predicted rank = Σ_t P(bin > t).

That sum of nine squashed cosines is no inner product of any two vectors, so no index finds its top without scoring
every item nine times. ``ranker.losses.OrdinalThresholds`` keeps the targets and gives up the nine embeddings: one
score, ordered thresholds, σ monotone in the score, hence the order of one inner product.

Here the hidden layers are shared and the nine outputs are apart. Batches, outsiders, schedule and the choice of the
step are those of ``fit_head``, and every α_t is kept negative, so that only the loss and its heads differ.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from byline.evaluation.map import mean_average_precision
from byline.ranker.fit import FitConfig
from byline.ranker.labelled_set import LabelledSet, influence_ranks
from byline.ranker.sampling import PairSampler

FloatArray = npt.NDArray[np.float32]
BINS = 10


class PublishedOrdinalHead(nn.Module):
    """Shared hidden layers, nine outputs; features are standardised by the items (queries by their own mean)."""

    def __init__(self, items: FloatArray, queries: FloatArray, hidden: tuple[int, ...], out_dim: int, dropout: float,
                 slope: float) -> None:
        super().__init__()
        deviation = items.std(0, dtype=np.float64)
        scale = np.where(deviation > 1e-6, 1.0 / np.maximum(deviation, 1e-6), 0.0)
        for name, values in (("item_mean", items.mean(0)), ("query_mean", queries.mean(0)), ("scale", scale)):
            self.register_buffer(name, torch.from_numpy(np.asarray(values, dtype=np.float32)))
        layers: list[nn.Module] = []
        width = items.shape[1]
        for inside in hidden:
            layers += [nn.Linear(width, inside), nn.ReLU(), nn.Dropout(dropout)]
            width = inside
        self.trunk = nn.Sequential(*layers, nn.Linear(width, (BINS - 1) * out_dim))
        for module in self.trunk:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        self.raw_slopes = nn.Parameter(torch.full((BINS - 1,), math.log(math.expm1(slope))))
        borders = torch.arange(1, BINS) / BINS
        self.biases = nn.Parameter(torch.logit(1.0 - borders))

    def embed(self, features: Tensor, *, queries: bool) -> Tensor:
        """Unit vectors [9, n, out] of [n, in]."""
        mean = self.get_buffer("query_mean" if queries else "item_mean")
        z = ((features - mean) * self.get_buffer("scale")).clamp(-8.0, 8.0)
        found = self.trunk(z).unflatten(1, (BINS - 1, -1))
        return functional.normalize(found, dim=2, eps=1e-6).transpose(0, 1)

    def logits(self, queries: Tensor, items: Tensor) -> Tensor:
        """[9, b, m] of P(bin > t), t = 0 … 8, of embedded queries [9, b, out] and items [9, m, out]."""
        slopes = -functional.softplus(self.raw_slopes)[:, None, None]
        return slopes * (queries @ items.transpose(1, 2)) + self.biases[:, None, None]

    def scores(self, query_features: FloatArray, item_features: FloatArray) -> FloatArray:
        """[q, n], minus the predicted rank: higher = more influential."""
        was_training = self.training
        self.eval()
        with torch.no_grad():
            queries, items = (self.embed(torch.from_numpy(np.array(rows, dtype=np.float32)), queries=first)
                              for rows, first in ((query_features, True), (item_features, False)))
            found = -torch.sigmoid(self.logits(queries, items)).sum(0)
        self.train(was_training)
        return np.asarray(found.numpy(), dtype=np.float32)


@dataclass(frozen=True)
class OrdinalFit:
    """The state with the best validation mAP(L), and all values seen by step."""

    head: PublishedOrdinalHead
    best_map: float
    history: tuple[tuple[int, float], ...]


def fit_published_ordinal(train: LabelledSet, validation: LabelledSet, fit: FitConfig, seed: int, *,
                          hidden: tuple[int, ...] = (512, 512), out_dim: int = 512, dropout: float = 0.1,
                          slope: float = 8.0, progress: Callable[[int, int], None] = lambda done, total: None,
                          ) -> OrdinalFit:
    """Train on ``train``, choosing the step by mAP(``fit.evaluate_at``) on ``validation``; seeded."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = PublishedOrdinalHead(train.item_features, train.query_features, hidden, out_dim, dropout, slope)
        sampler = PairSampler(influence_ranks(train.tau), queries_per_step=fit.queries_per_step,
                              items_per_step=fit.items_per_step, outside_share=fit.outside_share,
                              rng=np.random.default_rng(seed))
        optimizer = torch.optim.AdamW([
            {"params": list(head.trunk.parameters()), "lr": fit.learning_rate, "weight_decay": fit.weight_decay},
            {"params": [head.raw_slopes, head.biases], "lr": fit.slope_learning_rate, "weight_decay": 0.0},
        ])
        queries, items = (torch.from_numpy(np.array(rows, dtype=np.float32))
                          for rows in (train.query_features, train.item_features))
        history: list[tuple[int, float]] = []
        best, state = -1.0, copy.deepcopy(head.state_dict())
        for step in range(1, fit.max_steps + 1):
            batch = sampler.draw()
            head.train()
            logits = head.logits(head.embed(queries[batch.queries], queries=True),
                                 head.embed(items[batch.items], queries=False))
            loss = ordinal_loss(logits, torch.from_numpy(batch.ranks), torch.from_numpy(batch.totals),
                                torch.from_numpy(batch.mask))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            progress(step, fit.max_steps)
            if step % fit.evaluate_every and step != fit.max_steps:
                continue
            scores = head.scores(validation.query_features, validation.item_features)
            found = mean_average_precision(scores, validation.tau, fit.evaluate_at).mean
            history.append((step, found))
            if found > best:
                best, state = found, copy.deepcopy(head.state_dict())
    head.load_state_dict(state)
    head.eval()
    return OrdinalFit(head, best, tuple(history))


def ordinal_loss(logits: Tensor, ranks: Tensor, totals: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy summed over the nine borders, mean over the counted pairs; ``logits`` [9, b, m]."""
    place = ranks.to(logits.dtype) / totals.to(logits.dtype).clamp_min(1.0)[:, None]
    bins = (place * BINS).floor().clamp(0, BINS - 1)
    beyond = (bins[None] > torch.arange(BINS - 1)[:, None, None]).to(logits.dtype)
    each = functional.binary_cross_entropy_with_logits(logits, beyond, reduction="none").sum(0)
    counted = mask.to(logits.dtype)
    return (each * counted).sum() / counted.sum().clamp_min(1.0)
