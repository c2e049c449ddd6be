"""The table that says what a head is worth: beside raw features, orders without an image, and the labels' ceiling.

A block that estimates influence by itself (``byline.ranker.head.DIRECT``) stands there twice: by its cosine as every
other raw feature, and by its plain inner product, of which nothing is learnt. A head that contains it owes its labels
only what it has beyond that.

Why it exists: a mAP alone says nothing. Raw features say what one gets for free, the no-image rows what can be had
without looking at the query, and the ceiling (one half of the teacher's noise draws against the other) how much of the
labels is signal at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from byline.evaluation.baselines import (
    combined_raw_scores,
    global_mean_rank_scores,
    prompt_neighbour_scores,
    raw_feature_scores,
)
from byline.evaluation.bootstrap import PairedDifference, paired_bootstrap
from byline.evaluation.head_measures import Order, gain_json
from byline.evaluation.map import MapResult, mean_average_precision
from byline.ranker.head import DIRECT
from byline.ranker.labelled_set import LabelledSet

FloatArray = npt.NDArray[np.float32]

#: Encoders that see the prompt only.
TEXT_FEATURES = frozenset({"minilm", "clip_text"})


@dataclass(frozen=True)
class ReportRow:
    """One way to order the items: head, raw, direct, no_image or ceiling; ``head_gain`` is head minus this row."""

    name: str
    kind: str
    result: MapResult
    head_gain: PairedDifference | None


@dataclass(frozen=True)
class HeadReport:
    """All rows on the same held-out queries; ``cutoff`` is the L of mAP(L), ``orders`` what was judged, row by row."""

    rows: tuple[ReportRow, ...]
    cutoff: int
    queries: int
    orders: tuple[Order, ...] = ()

    def best(self, kind: str) -> ReportRow | None:
        """The row of this kind with the highest mAP, if there is one."""
        return max((row for row in self.rows if row.kind == kind), key=lambda row: row.result.mean, default=None)

    def to_json(self) -> dict[str, object]:
        """Figures as plain numbers; ``map`` is in the form of design §12."""
        head, ceiling = self.best("head"), self.best("ceiling")
        return {
            "map": {
                "head": head.result.mean if head else None,
                "head_standard_error": head.result.standard_error if head else None,
                "raw": {row.name: row.result.mean for row in self.rows if row.kind == "raw"},
                "no_image": {row.name: row.result.mean for row in self.rows if row.kind == "no_image"},
                "ceiling": ceiling.result.mean if ceiling else None, "L": self.cutoff, "queries": self.queries,
            },
            "rows": [_row_json(row) for row in self.rows],
        }


def report_head(head_scores: FloatArray, held_out: LabelledSet, train: LabelledSet, blocks: list[tuple[str, int]],
                *, cutoff: int, other_half: FloatArray | None, seed: int) -> HeadReport:
    """Judge ``head_scores`` [q, n] and every baseline on ``held_out``.

    ``blocks`` are (encoder, width) in the order of the feature columns; ``other_half`` [q, n] is τ of the held-out
    queries from the noise draws that ``held_out`` does not use (None: no ceiling).
    """
    ordered = [Order("head", "head", head_scores), *baseline_orders(held_out, train, blocks, other_half)]
    results = [(order.name, order.kind, mean_average_precision(order.scores, held_out.tau, cutoff))
               for order in ordered]
    head = results[0][2]
    return HeadReport(tuple(
        ReportRow(name, kind, result,
                  None if kind == "head" else paired_bootstrap(head.per_query, result.per_query, seed=seed))
        for name, kind, result in results
    ), cutoff, int(head.per_query.shape[0]), tuple(ordered))


def baseline_orders(held_out: LabelledSet, train: LabelledSet, blocks: Sequence[tuple[str, int]],
                    other_half: FloatArray | None) -> list[Order]:
    """What a head stands beside: raw features, orders that see no image, and the ceiling if there is another half.

    Arguments as for :func:`report_head`.
    """
    queries = train.query_features.mean(0)
    parts: list[FloatArray] = []
    found: list[Order] = []
    direct: list[Order] = []
    text_columns: slice | None = None
    start = 0
    for name, width in blocks:
        columns = slice(start, start + width)
        start += width
        text_columns = columns if name in TEXT_FEATURES else text_columns
        parts.append(raw_feature_scores(held_out.query_features[:, columns], held_out.item_features[:, columns],
                                        query_mean=queries[columns]))
        found.append(Order(name, "raw", parts[-1]))
        if name in DIRECT:
            direct.append(Order(f"{name}, inner product", "direct",
                                held_out.query_features[:, columns] @ held_out.item_features[:, columns].T))
    if len(parts) > 1:
        found.append(Order("+".join(name for name, _ in blocks), "raw", combined_raw_scores(parts)))
    found += direct
    found.append(Order("global_mean_rank", "no_image", global_mean_rank_scores(train, held_out.queries)))
    if text_columns is not None:
        found.append(Order("prompt_neighbours", "no_image",
                           prompt_neighbour_scores(train, train.query_features[:, text_columns],
                                                   held_out.query_features[:, text_columns])))
    if other_half is not None:
        # Where one half is not scored neither is the other, so NaN never meets a scored item.
        found.append(Order("teacher_other_half", "ceiling", np.nan_to_num(other_half, nan=-np.inf)))
    return found


def _row_json(row: ReportRow) -> dict[str, object]:
    gain = row.head_gain
    return {
        "name": row.name, "kind": row.kind, "map": row.result.mean, "standard_error": row.result.standard_error,
        "head_gain": None if gain is None else gain_json(gain),
    }
