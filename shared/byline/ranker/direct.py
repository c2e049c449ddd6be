"""The part of a head that is not learnt from labels: a block whose inner product is an estimate of influence already.

Why it exists: the ``gradient`` feature stands in a principal basis of the very gradients that influence is made of.
What is left to choose are two numbers, on validation queries. How much the weak directions count: their share of the
items' mean square, to a power p, weighs the query; p = 0 is the inner product as it is, larger p trusts the strong
directions more, which the few draws of a query know better. And how much an item's length counts: it is divided by its
length to a power a. A large gradient *is* influence, and a = 1 (the cosine) loses a third of the order; but lengths
are noisy too, and a little of a puts the true first item first more often. The directions come largest first, so a
narrower embedding is the leading columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Powers of the spread and of the length that are tried on validation queries.
EXPONENTS = (0.0, 0.1, 0.2, 0.3, 0.4)
TEMPERS = (0.0, 0.1, 0.2, 0.3, 0.4)
#: The smallest share of the largest mean square that a direction is weighed by: p must not amplify nothing.
_FLOOR = 1e-8


class DirectPart(nn.Module):
    """Queries of unit length times their weights, items nearly as they are; nothing here has a gradient."""

    spread: Tensor
    exponent: Tensor
    temper: Tensor
    length: Tensor
    unit: Tensor

    def __init__(self, dim: int) -> None:
        """``dim`` columns."""
        super().__init__()
        self.register_buffer("spread", torch.ones(dim))
        self.register_buffer("exponent", torch.tensor(0.0))
        self.register_buffer("temper", torch.tensor(0.0))
        self.register_buffer("length", torch.tensor(1.0))
        self.register_buffer("unit", torch.tensor(1.0))

    def initialise(self, items: Tensor, queries: Tensor) -> None:
        """From feature rows [n, dim] and [q, dim]: the spread, and the unit of a score (its median size)."""
        square = items.double().pow(2).mean(0)
        self.spread.copy_((square / square.max().clamp_min(1e-300)).clamp_min(_FLOOR).float())
        self.length.copy_(items.norm(dim=1).median().clamp_min(torch.finfo(torch.float32).tiny))
        self.set_powers(float(self.exponent), float(self.temper), items, queries)

    def set_powers(self, exponent: float, temper: float, items: Tensor, queries: Tensor) -> None:
        """Choose p and a; the unit follows, so that the other parts of a head keep their weight beside this one."""
        self.exponent.fill_(exponent)
        self.temper.fill_(temper)
        self.unit.fill_(1.0)
        asked = queries if queries.shape[0] else items
        size = (self.queries(asked[:256]) @ self.items(items).T).abs().median()
        self.unit.copy_(1.0 / size.clamp_min(torch.finfo(torch.float32).tiny))

    def queries(self, features: Tensor) -> Tensor:
        """[b, dim] → [b, dim]."""
        return functional.normalize(features, dim=1, eps=1e-12) * self.spread.pow(self.exponent) * self.unit

    def items(self, features: Tensor) -> Tensor:
        """[b, dim] → [b, dim], tempered: of the corpus's median length as they are."""
        length = features.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        factor: Tensor = (self.length / length).pow(self.temper)
        return features * factor
