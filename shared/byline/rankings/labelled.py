"""From stored rankings to the matrices a head is trained on and judged by.

Why it exists: two rules of honest evaluation live here and nowhere else. A student learns from one half of the
teacher's noise draws and is judged on the other (about a tenth of mAP would otherwise be shared item noise); and
held-out queries with too few scored items do not judge, because their mAP(L) means something else.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from sqlalchemy import Engine, func, select

from byline.db.session import transaction
from byline.errors import LabelsNotUsable
from byline.ranker.labelled_set import LabelledSet, dense_tau
from byline.rankings.store import NOT_A_REPEAT, QUERIES, RANKINGS, LabelledQuery, RankingStore

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

#: The half of the noise draws a student learns from, and the one it is judged by.
LEARN, JUDGE = 0, 1
#: Methods of which both halves have the items' noise: a sketch was made once, its halves differ in the query's draws
#: alone; in a kernel stand the gradients of all draws.
_SHARES_ITEM_NOISE = frozenset({"sketch", "trak", "d_trak"})


class Ranked(Protocol):
    """What the rules below need of a ranking, be it from the database or from a label file."""

    @property
    def item_ids(self) -> IntArray:
        """[n]."""
        ...

    @property
    def tau(self) -> FloatArray:
        """[n]."""
        ...

    @property
    def standard_error(self) -> FloatArray:
        """[n], of τ; NaN where unknown."""
        ...

    @property
    def tau_halves(self) -> FloatArray | None:
        """[2, n], or None where the teacher kept none."""
        ...


AnyRanked = TypeVar("AnyRanked", bound=Ranked)


@dataclass(frozen=True)
class LabelSplits:
    """Stored rankings by what they are for."""

    train: tuple[LabelledQuery, ...]
    validation: tuple[LabelledQuery, ...]
    test: tuple[LabelledQuery, ...]

    @property
    def digest(self) -> str:
        """sha256 over the train and validation rankings: equal digests mean the same labels."""
        digest = hashlib.sha256()
        for query in (*self.train, *self.validation):
            digest.update(query.query_id.bytes + query.item_ids.tobytes() + query.tau.tobytes())
        return digest.hexdigest()


def teacher_family(teacher_id: str) -> str:
    """Method and objective of a teacher id, without its settings: rankings of one family measure the same thing."""
    return teacher_id.partition("/")[0]


def halves_are_disjoint(rankings: Sequence[Ranked], teacher: str) -> bool:
    """Whether the two halves of every ranking by ``teacher`` (an id or a family) rest on different noise of the items.

    Only then is a student judged on noise it has not learnt from, and only then is the other half a ceiling.
    """
    method = teacher_family(teacher).partition("+")[0]
    return method not in _SHARES_ITEM_NOISE and all(ranking.tau_halves is not None for ranking in rankings)


def exact_family(family: str) -> str | None:
    """The family whose verifications mean the same as this one's labels: ``abu_plus_linear`` is ``abu_plus`` to first
    order, and ranks as it does (docs/teacher.md). None for a teacher that is the first order of nothing."""
    method, plus, objective = family.partition("+")
    return method.removesuffix("_linear") + plus + objective if method.endswith("_linear") else None


def load_splits(store: RankingStore, model_id: str, family: str) -> LabelSplits:
    """All rankings of the model by teachers of ``family`` (a method name, or a full teacher id).

    Verifications of clients that opted in come to the training queries, by the exact teacher of that family, too. To
    judge by they are too narrow; and of what clients ask nothing is in the test split, which stays as it was frozen.
    """
    names = list(store.teachers(model_id))
    rankings = [ranking for name in names if family in (name, teacher_family(name))
                for ranking in store.load(model_id, name)]
    exact = exact_family(family)
    verified = [ranking for name in names if teacher_family(name) == exact
                for ranking in store.load(model_id, name, ("train",)) if ranking.source == "live"]
    return LabelSplits(
        train=tuple(one for one in (*rankings, *verified) if one.split == "train"),
        validation=tuple(one for one in rankings if one.split == "validation"),
        test=tuple(one for one in rankings if one.split == "test" and one.source != "live"),
    )


def count_rankings(engine: Engine, model_id: str, family: str) -> int:
    """How many rankings :func:`load_splits` would give for training and validation, without reading them."""
    statement = (
        select(RANKINGS.c.teacher_id, QUERIES.c.split, QUERIES.c.source, func.count())
        .join(QUERIES, RANKINGS.c.query_id == QUERIES.c.id)
        .where(RANKINGS.c.model_id == model_id, QUERIES.c.split.in_(["train", "validation"]), NOT_A_REPEAT)
        .group_by(RANKINGS.c.teacher_id, QUERIES.c.split, QUERIES.c.source)
    )
    with transaction(engine) as connection:
        found = connection.execute(statement).all()
    exact = exact_family(family)
    return sum(
        int(count) for teacher_id, split, source, count in found
        if family in (teacher_id, teacher_family(teacher_id))
        or (teacher_family(teacher_id) == exact and (split, source) == ("train", "live"))
    )


def judging_queries(rankings: Sequence[AnyRanked], cutoff: int) -> tuple[AnyRanked, ...]:
    """The rankings whose mAP(``cutoff``) means the same: of about as many items as the widest of them.

    That is at least ``2 * cutoff`` items and half as many as the widest has; all rankings if none is that wide. A few
    hundred preselected candidates are easier to order than a corpus, and mixing both would blur the figure.
    """
    widest = max((ranking.item_ids.shape[0] for ranking in rankings), default=0)
    enough = max(2 * cutoff, widest / 2)
    return tuple(ranking for ranking in rankings if ranking.item_ids.shape[0] >= enough) or tuple(rankings)


def half_of(ranking: Ranked, half: int) -> FloatArray:
    """τ [n] from one of two disjoint sets of noise draws; all of τ where the teacher kept no halves."""
    return ranking.tau if ranking.tau_halves is None else ranking.tau_halves[half]


def half_error(ranking: Ranked) -> FloatArray:
    """Standard error [n] of :func:`half_of`: of half as many draws, where there are halves."""
    return ranking.standard_error if ranking.tau_halves is None else ranking.standard_error * np.float32(math.sqrt(2.0))


def labelled_set(rankings: Sequence[Ranked], query_features: FloatArray, item_ids: IntArray,
                 item_features: FloatArray, half: int, *, errors: bool = False) -> LabelledSet:
    """Rankings over the items as a matrix. ``query_features`` [q, in] in the order of ``rankings``.

    ``errors``: with the labels' standard errors, a second matrix as large as τ; a weighted fit needs it.
    """
    if not rankings:
        raise LabelsNotUsable("there are no rankings of this kind")
    tau = dense_tau(item_ids, [r.item_ids for r in rankings], [half_of(r, half) for r in rankings])
    error = dense_tau(item_ids, [r.item_ids for r in rankings], [half_error(r) for r in rankings]) if errors else None
    return LabelledSet(query_features, item_ids, item_features, tau, error)
