"""Heads of the year: fitted as the trainer does, judged on live prompts, compared with the teacher's cheap estimate.

Why it exists: labels here have dates. A ranking made before an artist joined says nothing of his items, and one who
left is in no ranking; every set of labels is cut by that in one place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from byline.evaluation.map import mean_average_precision
from byline.evaluation.recall import recall_at
from byline.evaluation.study_data import JUDGE, LEARN
from byline.ranker.head import DIRECT, Head, HeadConfig
from byline.ranker.labelled_set import LabelledSet
from byline.simulation.pieces import Fitted, MakeHead
from byline.simulation.world import LIVE, Corpus, World

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Label:
    """A query the teacher has ranked, and the week it did."""

    row: int
    week: int


@dataclass(frozen=True)
class LiveView:
    """A head on all live prompts at one state of the corpus, by row of the query: mAP(L), overlap of its first L with
    the teacher's, and how many of the teacher's first L by artists who joined are among its own (NaN before)."""

    precision: dict[int, float]
    overlap: dict[int, float]
    newcomers: dict[int, float]

    def traffic_map(self, world: World, week: int) -> float:
        """mAP(L) that a client of the week gets on average."""
        by_topic = self.by_topic(world, self.precision)
        return float(np.dot(world.settings.traffic(week), by_topic))

    @staticmethod
    def by_topic(world: World, values: dict[int, float]) -> tuple[float, float]:
        """Means over the live prompts of each topic."""
        first, second = (float(np.mean([values[row] for row in world.rows(LIVE, topic).tolist()])) for topic in (0, 1))
        return first, second


@dataclass(frozen=True)
class HeadMaker:
    """Fits and judges heads over some encoders."""

    world: World
    encoders: tuple[str, ...]
    make_head: MakeHead

    @property
    def corpus(self) -> Corpus:
        """Of the world."""
        return self.world.corpus

    def labelled(self, labels: Sequence[Label], half: int, week: int) -> LabelledSet:
        """The labels as they are in ``week``: over the items present, NaN for those that came after the ranking."""
        rows = np.asarray([label.row for label in labels], dtype=np.int64)
        items = np.flatnonzero(self.world.present(week))
        found = self.corpus.data.labelled(rows, half, self.encoders, items=items)
        known = np.stack([self.world.present(label.week)[items] for label in labels])
        return replace(found, tau=np.where(known, found.tau, np.nan).astype(np.float32))

    def fit(self, train: Sequence[Label], validation: Sequence[Label], week: int, seed: int,
            previous: tuple[Head, float] | None, learn: bool) -> Fitted:
        """Of all starts the trainer tries the one that validates best."""
        settings = self.world.settings
        names, widths = zip(*self.corpus.data.blocks_of(self.encoders), strict=True)
        config = HeadConfig.of_encoders(names, widths, settings.hidden, settings.out_dim)
        return self.make_head(self.labelled(train, LEARN, week), self.labelled(validation, JUDGE, week), config,
                              settings.epochs, settings.cutoff, seed, previous, learn)

    def live(self, head: Head, week: int) -> LiveView:
        """Judged by the noise half that nothing learns from, over the items present."""
        rows = np.concatenate([self.world.rows(LIVE, topic) for topic in (0, 1)])
        found = self.labelled([Label(int(row), week) for row in rows], JUDGE, week)
        cutoff = min(self.world.settings.cutoff, found.items)
        scores = head.scores(found.query_features, found.item_features)
        precision = mean_average_precision(scores, found.tau, cutoff).per_query
        overlap = recall_at(scores, found.tau, cutoff, cutoff)
        joined = self.world.joining[self.world.present(week)]
        newcomers = _found_of(scores, found.tau, cutoff, joined)
        return LiveView(*({int(r): float(v) for r, v in zip(rows, values, strict=True)}
                          for values in (precision, overlap, newcomers)))  # fmt: skip

    def disagreement(self, head: Head, rows: IntArray, week: int) -> DoubleArray | None:
        """[p]: the share of the estimated tier's first L items that the head's first L lack; None without estimates.

        The estimate is the inner product of the generator's gradients: it needs the query's own, and no pass over the
        corpus."""
        direct = [name for name in self.corpus.data.encoders if name in DIRECT]
        if not direct:
            return None
        data, items = self.corpus.data, np.flatnonzero(self.world.present(week))
        columns, own = data.columns(direct[:1]), data.columns(self.encoders)
        estimated = data.query_features[np.ix_(rows, columns)] @ data.item_features[np.ix_(items, columns)].T
        scores = head.scores(data.query_features[np.ix_(rows, own)], data.item_features[np.ix_(items, own)])
        cutoff = min(self.world.settings.cutoff, len(items))
        return np.asarray(1.0 - recall_at(scores, estimated.astype(np.float32), cutoff, cutoff), dtype=np.float64)


def labels_digest(corpus: Corpus, train: Sequence[Label], validation: Sequence[Label]) -> str:
    """sha256 over the rankings a head learnt from and was stopped by, with their weeks."""
    digest = hashlib.sha256()
    for half, labels in ((LEARN, train), (JUDGE, validation)):
        for label in labels:
            digest.update(f"{label.row}/{label.week}/".encode() + corpus.data.tau[half, label.row].tobytes())
    return digest.hexdigest()


def _found_of(scores: FloatArray, tau: FloatArray, cutoff: int, some: Mask) -> DoubleArray:
    """[q]: of the teacher's first L that are in ``some``, the share among the predicted first L; NaN for none."""
    wanted = np.argsort(-tau, axis=1, kind="stable")[:, :cutoff]
    given = np.argsort(-scores, axis=1, kind="stable")[:, :cutoff]
    values = []
    for asked, answered in zip(wanted, given, strict=True):
        mine = asked[some[asked]]
        values.append(float(np.isin(mine, answered).mean()) if len(mine) else np.nan)
    return np.asarray(values)
