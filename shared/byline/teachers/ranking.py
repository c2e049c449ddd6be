"""What a teacher is asked and what it answers: plain values that outlive any teacher.

Why it exists: rankings are kept for ever, raw scores included, so their shape must not depend on
which method made them or on how it was run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

#: Called with (done, total) in the teacher's own unit of work.
Progress = Callable[[int, int], None]
#: Raises to stop the teacher between chunks (cancelled job, lost lease).
Check = Callable[[], None]


def ignore_progress(done: int, total: int) -> None:
    """A Progress that shows nothing."""


def never_cancelled() -> None:
    """A Check that never stops."""


@dataclass(frozen=True)
class TeacherQuery:
    """A generated image and its prompt."""

    image: Image.Image
    prompt: str


@dataclass(frozen=True)
class TeacherItem:
    """A corpus item as the teacher needs it."""

    item_id: int
    image: Image.Image
    caption: str


@dataclass(frozen=True)
class Ranking:
    """The teacher's scores of one query, in the order of the candidates (not sorted).

    ``item_ids`` int64 [n]; ``tau`` float32 [n], the rise of the item's denoising loss caused by one
    unlearning step on the query: **higher = more influential**; ``standard_error`` float32 [n] from
    Monte-Carlo replicates; ``tau_halves`` float32 [2, n], the same score from two disjoint sets of
    noise draws (their agreement is the ceiling of any student); ``draws`` per item.
    """

    item_ids: NDArray[np.int64]
    tau: NDArray[np.float32]
    standard_error: NDArray[np.float32]
    tau_halves: NDArray[np.float32]
    draws: int
    teacher_id: str
    candidate_set: str

    def order(self) -> NDArray[np.int64]:
        """Item ids, most influential first; ties by item id, so the order is reproducible."""
        return self.item_ids[np.lexsort((self.item_ids, -self.tau))]


def summarise(
    replicates: NDArray[np.float64], item_ids: NDArray[np.int64], draws: int, teacher_id: str, candidate_set: str
) -> Ranking:
    """A Ranking from per-replicate scores ``replicates`` [r, n] of equal weight.

    The standard error is that of the mean of r independent replicates; even and odd replicates are
    the two disjoint halves.
    """
    count = len(replicates)
    spread = replicates.std(axis=0, ddof=1) / np.sqrt(count) if count > 1 else np.full(len(item_ids), np.nan)
    halves = np.stack([replicates[0::2].mean(0), replicates[1::2].mean(0)]) if count > 1 else replicates.repeat(2, 0)
    return Ranking(
        item_ids=item_ids.astype(np.int64),
        tau=replicates.mean(axis=0).astype(np.float32),
        standard_error=spread.astype(np.float32),
        tau_halves=halves.astype(np.float32),
        draws=draws,
        teacher_id=teacher_id,
        candidate_set=candidate_set,
    )


class Teacher(Protocol):
    """A method that scores influence. Implementations are stateless between queries but for caches."""

    @property
    def teacher_id(self) -> str:
        """Method + settings hash + model revision + noise scheme: equal ids give equal scores."""
        ...

    def score(
        self,
        query: TeacherQuery,
        candidates: Sequence[TeacherItem],
        *,
        candidate_set: str = "given",
        progress: Progress = ignore_progress,
        check: Check = never_cancelled,
    ) -> Ranking:
        """Score ``candidates`` for ``query``; ``check`` is called between chunks and may raise."""
        ...
