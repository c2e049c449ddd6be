"""What a teacher is asked and what it answers: plain values that outlive any teacher.

Why it exists: rankings are kept for ever, raw scores included, so their shape must not depend on
which method made them or on how it was run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

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
    noise draws (their agreement is the ceiling of any student); ``draws`` the budget per item;
    ``samples`` int32 [n], the loss evaluations each tau rests on: ``draws``, twice that with flips,
    fewer for candidates a race dropped. Of fewer samples is a larger ``standard_error``, not another tau.
    """

    item_ids: NDArray[np.int64]
    tau: NDArray[np.float32]
    standard_error: NDArray[np.float32]
    tau_halves: NDArray[np.float32]
    draws: int
    samples: NDArray[np.int32]
    teacher_id: str
    candidate_set: str

    def order(self) -> NDArray[np.int64]:
        """Item ids, most influential first; ties by item id, so the order is reproducible."""
        return self.item_ids[np.lexsort((self.item_ids, -self.tau))]


def summarise(
    replicates: NDArray[np.float64],
    item_ids: NDArray[np.int64],
    draws: int,
    teacher_id: str,
    candidate_set: str,
    *,
    samples: NDArray[np.int32] | None = None,
    flips: Literal["none", "max", "mean"] = "none",
) -> Ranking:
    """A Ranking from per-replicate scores of equal weight, [r, n]; with flips [2, r, n], one per orientation.

    The standard error is that of the mean of an item's replicates; even and odd replicates are the
    two disjoint halves. NaN marks a replicate that was not run: every item is judged by those it
    has. ``max`` takes the orientation with the higher mean (not the higher of each replicate, which
    would reward noise); each half chooses by itself, so that halves stay independent.
    ``samples`` defaults to ``draws``, times two with flips.
    """
    oriented = replicates if flips != "none" else replicates[None]  # [o, r, n]
    if flips == "mean":
        oriented = oriented.mean(axis=0, keepdims=True)
    count = (~np.isnan(oriented)).sum(axis=1)  # [o, n]
    mean = _mean(oriented)
    spread = np.full(mean.shape, np.nan)
    many = count > 1
    squares = np.nansum((oriented - mean[:, None]) ** 2, axis=1)
    spread[many] = np.sqrt(squares[many] / (count[many] - 1) / count[many])
    best = mean.argmax(axis=0)[None]
    halves = np.stack([_mean(oriented[:, half::2]).max(axis=0) for half in (0, 1)])
    # An item with replicates of one parity only has nothing disjoint to show: both halves are all of it.
    tau = np.take_along_axis(mean, best, axis=0)[0]
    halves = np.where(np.isnan(halves).any(axis=0), tau, halves)
    if samples is None:
        samples = np.full(len(item_ids), draws * (1 if flips == "none" else 2))
    return Ranking(
        item_ids=item_ids.astype(np.int64),
        tau=tau.astype(np.float32),
        standard_error=np.take_along_axis(spread, best, axis=0)[0].astype(np.float32),
        tau_halves=halves.astype(np.float32),
        draws=draws,
        samples=samples.astype(np.int32),
        teacher_id=teacher_id,
        candidate_set=candidate_set,
    )


def with_query_noise(
    ranking: Ranking, halves: NDArray[np.float64], flips: Literal["none", "max", "mean"] = "none"
) -> Ranking:
    """``ranking``, the mean over ``halves``, with what the noise of the query's own gradient adds to its errors.

    ``halves``: the replicates ``summarise`` takes, once for each of two disjoint halves of the query's draws,
    [2, r, n] or [2, 2, r, n] with flips. The two halves of tau then share no noise at all, neither the
    items' nor the query's, and the error gains the standard error of the mean of two.
    """
    one, other = (summarise(h, ranking.item_ids, ranking.draws, "", "", flips=flips) for h in halves)
    apart = (one.tau.astype(np.float64) - other.tau) / 2
    return replace(
        ranking,
        tau_halves=np.stack([one.tau_halves[0], other.tau_halves[1]]),
        standard_error=np.hypot(ranking.standard_error, apart).astype(np.float32),
    )


def _mean(replicates: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over axis 1 of what is not NaN; NaN where nothing is. [o, r, n] to [o, n]."""
    count = (~np.isnan(replicates)).sum(axis=1)
    return np.where(count > 0, np.nansum(replicates, axis=1) / np.maximum(count, 1), np.nan)


class ScoresManyAtOnce(ABC):
    """For teachers whose one query is many queries of one."""

    def score(
        self,
        query: TeacherQuery,
        candidates: Sequence[TeacherItem],
        *,
        candidate_set: str = "given",
        progress: Progress = ignore_progress,
        check: Check = never_cancelled,
    ) -> Ranking:
        """``score_many`` of one query."""
        return self.score_many([query], candidates, candidate_set=candidate_set, progress=progress, check=check)[0]

    @abstractmethod
    def score_many(
        self,
        queries: Sequence[TeacherQuery],
        candidates: Sequence[TeacherItem],
        *,
        candidate_set: str = "given",
        progress: Progress = ignore_progress,
        check: Check = never_cancelled,
    ) -> list[Ranking]:
        """See ``Teacher``."""


class Teacher(Protocol):
    """A method that scores influence. Implementations are stateless between queries but for caches."""

    @property
    def teacher_id(self) -> str:
        """Method + settings hash + model revision + noise scheme: equal ids give equal scores."""
        ...

    def fit(
        self,
        corpus: Sequence[TeacherItem],
        *,
        progress: Progress = ignore_progress,
        check: Check = never_cancelled,
    ) -> None:
        """Compute and keep what scoring needs of the corpus alone; resumable, and nothing when all is there."""
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

    def score_many(
        self,
        queries: Sequence[TeacherQuery],
        candidates: Sequence[TeacherItem],
        *,
        candidate_set: str = "given",
        progress: Progress = ignore_progress,
        check: Check = never_cancelled,
    ) -> list[Ranking]:
        """``score`` for every query over the same candidates, in one pass over them where the method can."""
        ...
