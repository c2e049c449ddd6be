"""What every study works on: a corpus, its labelled queries, features of both and the teacher's two noise halves.

Why it exists: six studies that each split queries or choose noise halves by themselves could not be compared. Where
it all comes from is the command's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from byline.errors import LabelsNotUsable
from byline.ranker.labelled_set import LabelledSet
from byline.teachers.ranking import TeacherItem, TeacherQuery

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
#: The noise half that heads learn from and the one that judges, as in ``byline.rankings.labelled``.
LEARN, JUDGE = 0, 1
#: Called with (what is being done, done, total).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class StudyData:
    """``item_features`` [n, d] and ``query_features`` [q, d] of the encoders in ``blocks`` (name, width), in order;
    ``tau`` [2, q, n], the teacher's two halves of disjoint noise, and ``error`` [q, n] the standard error of one;
    ``splits`` [q]; ``digest`` of all of it."""

    items: Sequence[TeacherItem]
    queries: Sequence[TeacherQuery]
    splits: tuple[str, ...]
    blocks: tuple[tuple[str, int], ...]
    item_features: FloatArray
    query_features: FloatArray
    tau: FloatArray
    teacher_id: str
    digest: str
    disjoint: bool
    error: FloatArray | None = None

    @cached_property
    def item_ids(self) -> IntArray:
        """[n]."""
        return np.asarray([item.item_id for item in self.items], dtype=np.int64)

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names, in the order of the columns."""
        return tuple(name for name, _ in self.blocks)

    def rows(self, split: str) -> IntArray:
        """Places of a split's queries. LabelsNotUsable when it has none."""
        found = np.flatnonzero(np.asarray(self.splits) == split).astype(np.int64)
        if not len(found):
            raise LabelsNotUsable(f"the labels have no {split} queries; a study needs train, validation and test")
        return found

    def blocks_of(self, encoders: Sequence[str]) -> tuple[tuple[str, int], ...]:
        """(name, width) of some encoders, in the order given. LabelsNotUsable for one that was not encoded."""
        widths = dict(self.blocks)
        if missing := [name for name in encoders if name not in widths]:
            raise LabelsNotUsable(f"no features of {', '.join(missing)}; there are {', '.join(widths)}")
        return tuple((name, widths[name]) for name in encoders)

    def columns(self, encoders: Sequence[str]) -> IntArray:
        """Columns of some encoders, in the order given."""
        starts = dict(zip(self.encoders, np.cumsum([0, *(w for _, w in self.blocks)])[:-1], strict=True))
        return np.concatenate([np.arange(starts[n], starts[n] + w) for n, w in self.blocks_of(encoders)])

    def labelled(
        self, rows: IntArray, half: int, encoders: Sequence[str] = (), *, tau: FloatArray | None = None,
        items: IntArray | None = None,
    ) -> LabelledSet:  # fmt: skip
        """Queries at ``rows`` with one noise half, over some encoders (default all) and items (default all).

        ``tau`` [len(rows), items] replaces the snapshot's.
        """
        columns = self.columns(encoders or self.encoders)
        places = np.arange(len(self.items)) if items is None else items
        found = self.tau[half][np.ix_(rows, places)] if tau is None else tau
        error = self.error if tau is None else None
        return LabelledSet(
            np.ascontiguousarray(self.query_features[np.ix_(rows, columns)]), self.item_ids[places],
            np.ascontiguousarray(self.item_features[np.ix_(places, columns)]), found,
            None if error is None else error[np.ix_(rows, places)],
        )  # fmt: skip
