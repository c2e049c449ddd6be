"""What one refresh learns from and is judged by: rankings and items as matrices, without those whose image is lost.

Why it exists: a corpus of years has images that went missing, and one of them must not keep the model from being
refreshed for ever. It is left out, named in the manifest, and only where they are many is something else wrong, and
the refresh refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from byline.catalog.items import Item
from byline.errors import CorpusNotUsable, LabelsNotUsable
from byline.ranker.labelled_set import LabelledSet
from byline.rankings.features import Asked
from byline.rankings.labelled import (
    JUDGE,
    LEARN,
    LabelSplits,
    halves_are_disjoint,
    judging_queries,
    labelled_set,
)
from byline.rankings.store import LabelledQuery
from byline.telemetry import get_logger

log = get_logger(__name__)

FloatArray = npt.NDArray[np.float32]
#: Called with (what is being done, done, total).
Progress = Callable[[str, int, int], None]

#: With at least this many ranked test queries the gate judges on them; otherwise on the validation queries.
MINIMUM_TEST_QUERIES = 10
#: More lost images than this share, and than so many, are no accident: the storage is away, or the wrong one.
MOST_LOST, FEW_LOST = 0.01, 3


class FeatureRows(Protocol):
    """Features of items and queries, in one FeatureSpec; ``byline.rankings.features.LabelFeatures`` is one."""

    @property
    def spec(self) -> str:
        """Name of the FeatureSpec."""
        ...

    @property
    def preprocessing_hash(self) -> str:
        """Hash of what is done to an image or text before encoding."""
        ...

    @property
    def blocks(self) -> Sequence[tuple[str, int]]:
        """(encoder, width) in the order of the columns."""
        ...

    def lost_items(self, items: Sequence[Item], progress: Callable[[int, int], None]) -> Mapping[int, str]:
        """Ids of the items that cannot be encoded, and why."""
        ...

    def lost_queries(self, rankings: Sequence[Asked], progress: Callable[[int, int], None]) -> Mapping[int, str]:
        """Places in ``rankings`` of those that cannot be encoded, and why."""
        ...

    def lost_images(self, rankings: Sequence[Asked]) -> Mapping[int, str]:
        """Places in ``rankings`` of those whose image is lost, also where features of it are kept."""
        ...

    def of_items(self, items: Sequence[Item], progress: Callable[[int, int], None]) -> FloatArray:
        """[n, in] in the order of ``items``, of which none is lost."""
        ...

    def of_queries(self, rankings: Sequence[Asked], progress: Callable[[int, int], None]) -> FloatArray:
        """[q, in] in the order of ``rankings``, of which none is lost."""
        ...


@dataclass(frozen=True)
class LeftOut:
    """What could not be encoded, and why: items by id, queries by theirs."""

    items: Mapping[int, str]
    queries: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """For the manifest. Ids are strings there: JSON has no 64-bit integer."""
        return {"items": {str(item_id): why for item_id, why in self.items.items()}, "queries": dict(self.queries)}


@dataclass(frozen=True)
class RefreshLabels:
    """``splits`` are all rankings that were read; the sets and the rankings behind them, in their order, leave out
    what is lost, as ``items`` does."""

    splits: LabelSplits
    items: tuple[Item, ...]
    left_out: LeftOut
    train: LabelledSet
    validation: LabelledSet
    held_out: LabelledSet
    train_rankings: tuple[LabelledQuery, ...]
    validation_rankings: tuple[LabelledQuery, ...]
    held_out_rankings: tuple[LabelledQuery, ...]
    #: τ of the held-out queries from the noise half that does not judge, None if the halves are not disjoint.
    other_half: FloatArray | None
    held_out_split: str
    #: Test queries there are, wide enough to judge by.
    test_queries: int

    @property
    def fallback(self) -> str | None:
        """Why the validation queries judge, which chose the head too; None where test queries do."""
        if self.held_out_split == "test":
            return None
        return (f"{self.test_queries} test queries are ranked, {MINIMUM_TEST_QUERIES} are needed: the validation "
                "queries judge, which also chose the head")


def read_labels(splits: LabelSplits, items: Sequence[Item], features: FeatureRows, cutoff: int, teacher_family: str,
                progress: Progress, *, weighted: bool = False) -> RefreshLabels:
    """Encode what is not yet, and put it together; the rankings are ``teacher_family``'s.

    ``weighted``: what is learnt from knows the labels' standard errors. LabelsNotUsable if there is nothing to learn
    from or judge by.
    """
    lost_items = features.lost_items(items, _step(progress, "features of items"))
    _refuse_many(len(lost_items), len(items), "images of items", CorpusNotUsable)
    kept = tuple(item for item in items if item.item_id not in lost_items)
    every = (*splits.train, *splits.validation, *splits.test)
    # Those that judge are encoded again, under other prompts, so features that are kept do not suffice.
    first = len(splits.train)
    lost = {first + place: why for place, why in features.lost_images(every[first:]).items()}
    lost |= features.lost_queries(every, _step(progress, "features of queries"))
    _refuse_many(len(lost), len(every), "images of queries", LabelsNotUsable)
    gone = {every[place].query_id for place in lost}
    train, valid, tested = (
        tuple(one for one in split if one.query_id not in gone)
        for split in (splits.train, splits.validation, splits.test)
    )
    if not train or not valid:
        raise LabelsNotUsable(
            f"there are {len(train)} training and {len(valid)} validation rankings that can be used; both are needed. "
            "Import a snapshot (`byline labels import`) or wait for curation"
        )
    validation, test = judging_queries(valid, cutoff), judging_queries(tested, cutoff)
    use_test = len(test) >= MINIMUM_TEST_QUERIES
    held_out = test if use_test else validation
    ids = np.asarray([item.item_id for item in kept], dtype=np.int64)
    item_rows = features.of_items(kept, _step(progress, "features of items"))

    def build(rankings: Sequence[LabelledQuery], half: int) -> LabelledSet:
        rows = features.of_queries(rankings, _step(progress, "features of queries"))
        return labelled_set(rankings, rows, ids, item_rows, half, errors=weighted and half == LEARN)

    disjoint = halves_are_disjoint(held_out, teacher_family)
    return RefreshLabels(
        splits, kept, LeftOut(lost_items, {str(every[place].query_id): why for place, why in lost.items()}),
        build(train, LEARN), build(validation, JUDGE), build(held_out, JUDGE), train, validation, held_out,
        build(held_out, LEARN).tau if disjoint else None, "test" if use_test else "validation", len(test),
    )  # fmt: skip


def _refuse_many(lost: int, of: int, what: str, error: type[CorpusNotUsable] | type[LabelsNotUsable]) -> None:
    if lost > max(FEW_LOST, MOST_LOST * of):
        raise error(f"{lost} of {of} {what} are lost or broken (the log names them): is BYLINE_BLOB_DIR the right "
                    "folder? Restore them from a backup, or withdraw the items")  # fmt: skip
    if lost:
        log.warning("images_left_out", what=what, lost=lost, of=of)


def _step(progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(what, done, total)
