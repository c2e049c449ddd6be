"""What an unlearning teacher asks of an approximation of the Fisher matrix, and the trivial one.

Why it exists: AbU, AbU+ and the plain gradient differ in nothing but the matrix F in
tau = <(F + damping)^-1 grad L(query), grad L(item)>; with one interface every teacher can use each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from byline.errors import TeacherNotUsable
from byline.teachers.layers import SELECTIONS, includes


class Preconditioner(Protocol):
    """(F + damping)^-1 for the layers of one selection of one model.

    Gradients are per layer [..., rows, columns] (``EditableLayer``); ``damping`` is relative to the
    mean eigenvalue of each layer.
    """

    @property
    def name(self) -> str:
        """Stable text for a teacher id: equal names give equal results."""
        ...

    @property
    def selection(self) -> str:
        """Which layers it serves, a key of ``SELECTIONS``."""
        ...

    @property
    def model_revision(self) -> str:
        """The model it was fitted on."""
        ...

    def precondition(self, gradients: dict[str, torch.Tensor], damping: float) -> dict[str, torch.Tensor]:
        """(F + damping)^-1 g, same shapes."""
        ...

    def whiten(self, gradients: dict[str, torch.Tensor], damping: float) -> dict[str, torch.Tensor]:
        """Coordinates, same shapes, in which <whiten g, whiten h> = <precondition g, h>."""
        ...

    def restrict(self, selection: str) -> Preconditioner:
        """The same for fewer layers. Raises TeacherNotUsable when it lacks some of them."""
        ...

    def fingerprint(self, layers: Iterable[str]) -> str:
        """A few digits of what was fitted for these layers, whatever its name.

        The name says how a fit was made, not on which state of a corpus. What only means something beside the very
        same fit (a sketch) keeps this.
        """
        ...


def fingerprint_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """12 hex digits of named tensors, alike on every device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + b"\0")
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:12]


def refuse_unless_included(holder: str, outer: str, inner: str) -> None:
    """Raise TeacherNotUsable unless ``holder``, of selection ``outer``, serves every layer of ``inner``."""
    if inner not in SELECTIONS:
        raise TeacherNotUsable(f"layer selection {inner!r} is unknown; choose one of {sorted(SELECTIONS)}")
    if not includes(outer, inner):
        raise TeacherNotUsable(f"{holder} covers the selection {outer!r}, not {inner!r}: fit it for {inner!r}")


@dataclass(frozen=True)
class NoCurvature:
    """F = 1: the plain gradient, the baseline that shows what curvature is worth. Ignores damping."""

    selection: str
    model_revision: str

    @property
    def name(self) -> str:
        """See ``Preconditioner``."""
        return f"none-{self.selection}-{self.model_revision}"

    def precondition(self, gradients: dict[str, torch.Tensor], damping: float) -> dict[str, torch.Tensor]:
        """The gradients themselves."""
        return gradients

    def whiten(self, gradients: dict[str, torch.Tensor], damping: float) -> dict[str, torch.Tensor]:
        """The gradients themselves."""
        return gradients

    def restrict(self, selection: str) -> NoCurvature:
        """See ``Preconditioner``."""
        refuse_unless_included("this gradient", self.selection, selection)
        return replace(self, selection=selection)

    def fingerprint(self, layers: Iterable[str]) -> str:
        """See ``Preconditioner``; nothing is fitted."""
        return "none"
