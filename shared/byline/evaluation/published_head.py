"""The published recipe for a head, reimplemented from its description, as what ours is measured against.

Why it exists: "faster and better than the published trainer" needs that trainer beside ours, on the same pairs and
the same machine. Written from the facts in ``reference/method.md`` §5.2–5.4 alone:

- one tower for queries and items, Linear–ReLU–Dropout(.1) three times and a last Linear, 768 wide, Xavier weights, raw
  features as they come; cosine of the outputs; s = α cos + β with α = +1, β = 0 at the start;
- the label of the item at place j of a query's K ranked ones is j/K (0 = most influential), the loss binary
  cross-entropy of σ(s), so a *low* s means influence and the order is by ascending s;
- one pair at a time from a data set; with probability .1 the item is one from outside the ranked ones, label (K−1)/K;
- AdamW, rate 1e-3, constant, weight decay .01, 4,096 pairs a step, ten passes, the last state is the result.

``constrained`` changes one thing: α is kept negative, so that a high cosine means influence, as serving by
nearest neighbours needs. It stands beside the recipe as published, so that the comparison is not won by a sign.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from byline.evaluation.map import mean_average_precision
from byline.evaluation.stopwatch import Spent, Stopwatch
from byline.ranker.labelled_set import LabelledSet, influence_ranks

FloatArray = npt.NDArray[np.float32]
#: One pair: query features [in], item features [in], label in [0, 1).
Pair = tuple[Tensor, Tensor, float]


@dataclass(frozen=True)
class PublishedSettings:
    """The published values. ``slope`` is α at the start; ``constrained`` keeps its sign whatever the labels say."""

    slope: float = 1.0
    constrained: bool = False
    width: int = 768
    dropout: float = 0.1
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    batch: int = 4096
    passes: int = 10
    outsiders: float = 0.1
    #: Steps between two looks at the validation queries; looking does not count as training.
    look_every: int = 10


@dataclass(frozen=True)
class Look:
    """Validation mAP(L) after ``pairs`` pairs and what they had cost."""

    spent: Spent
    pairs: int
    validation_map: float


@dataclass(frozen=True)
class PublishedFit:
    """The last state, α and β as learned, and the looks on the way, the first of them before any step."""

    head: PublishedHead
    slope: float
    bias: float
    looks: tuple[Look, ...]
    pairs: int
    spent: Spent


class PublishedHead(nn.Module):
    """Tower and the affine map of the cosine."""

    def __init__(self, in_dim: int, settings: PublishedSettings) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inside in (in_dim, settings.width, settings.width):
            layers += [nn.Linear(inside, settings.width), nn.ReLU(), nn.Dropout(settings.dropout)]
        self.tower = nn.Sequential(*layers, nn.Linear(settings.width, settings.width))
        for module in self.tower:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        self._sign = math.copysign(1.0, settings.slope) if settings.constrained else 0.0
        start = math.log(math.expm1(abs(settings.slope))) if settings.constrained else settings.slope
        self.raw_slope = nn.Parameter(torch.tensor(start))
        self.bias = nn.Parameter(torch.zeros(()))

    @property
    def slope(self) -> Tensor:
        """α: free as published, or of the sign it began with."""
        return self._sign * functional.softplus(self.raw_slope) if self._sign else self.raw_slope * 1.0

    def embed(self, features: Tensor) -> Tensor:
        """Unit vectors [n, width] of [n, in]."""
        return functional.normalize(self.tower(features), dim=1)

    def forward(self, queries: Tensor, items: Tensor) -> Tensor:
        """s [n] of n pairs, low = influential."""
        return self.slope * (self.embed(queries) * self.embed(items)).sum(1) + self.bias

    def scores(self, query_features: FloatArray, item_features: FloatArray) -> FloatArray:
        """[q, n], higher = more influential: −s, the order the recipe is evaluated by, whichever sign α has."""
        was_training = self.training
        self.eval()
        with torch.no_grad():
            parts = [self.embed(torch.from_numpy(np.array(rows, dtype=np.float32)))
                     for rows in (query_features, item_features)]
            found = -(self.slope * (parts[0] @ parts[1].T) + self.bias)
        self.train(was_training)
        return np.asarray(found.numpy(), dtype=np.float32)


class RankedPairs(Dataset[Pair]):
    """Every (query, ranked item) of a labelled set; fetched one at a time."""

    def __init__(self, labelled: LabelledSet, outsiders: float, seed: int) -> None:
        ranks = influence_ranks(labelled.tau)
        self._places = np.argwhere(ranks >= 0)
        self._ranks = ranks
        self._totals = (ranks >= 0).sum(1)
        self._outside = [np.flatnonzero(row < 0) for row in ranks]
        self._queries = torch.from_numpy(np.array(labelled.query_features, dtype=np.float32))
        self._items = torch.from_numpy(np.array(labelled.item_features, dtype=np.float32))
        self._outsiders = outsiders
        self._rng = np.random.default_rng(seed)

    def __len__(self) -> int:
        return int(self._places.shape[0])

    def __getitem__(self, index: int) -> Pair:
        query, item = self._places[index]
        total = self._totals[query]
        rank = self._ranks[query, item]
        outside = self._outside[query]
        # A query of which every item is ranked has no outsiders.
        if outside.shape[0] and self._rng.random() < self._outsiders:
            item, rank = outside[self._rng.integers(outside.shape[0])], total - 1
        return self._queries[query], self._items[item], float(rank / total)


def fit_published(train: LabelledSet, validation: LabelledSet, settings: PublishedSettings, seed: int, *,
                  evaluate_at: int = 100, watch: Stopwatch | None = None,
                  progress: Callable[[int, int], None] = lambda done, total: None) -> PublishedFit:
    """Train as published on all pairs of ``train``; ``validation`` is only looked at, it decides nothing.

    ``progress(done, total)`` counts steps. The clock includes making the data set and the network, and stands still
    during looks. Seeded, which the original is not.
    """
    watch = watch or Stopwatch()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pairs = RankedPairs(train, settings.outsiders, seed)
        loader = DataLoader(pairs, batch_size=settings.batch, shuffle=True,
                            generator=torch.Generator().manual_seed(seed))
        head = PublishedHead(train.in_dim, settings)
        optimizer = torch.optim.AdamW(head.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
        looks = [_look(head, validation, evaluate_at, watch, 0)]
        steps, seen, total = 0, 0, settings.passes * len(loader)
        for _ in range(settings.passes):
            for queries, items, labels in loader:
                logits = head(queries, items)
                loss = functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                steps += 1
                seen += int(labels.shape[0])
                with watch.paused():
                    progress(steps, total)
                if steps % settings.look_every == 0 or steps == total:
                    looks.append(_look(head, validation, evaluate_at, watch, seen))
    spent = watch.read()
    head.eval()
    return PublishedFit(head, float(head.slope.detach()), float(head.bias.detach()), tuple(looks), seen, spent)


def _look(head: PublishedHead, validation: LabelledSet, cutoff: int, watch: Stopwatch, pairs: int) -> Look:
    with watch.paused():
        scores = head.scores(validation.query_features, validation.item_features)
        found = mean_average_precision(scores, validation.tau, cutoff).mean
    return Look(watch.read(), pairs, found)
