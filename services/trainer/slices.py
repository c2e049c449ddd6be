"""The kinds of held-out queries a candidate may not get worse at, and whether it did.

Why it exists: a mean that rises can hide a kind of query that falls. The kinds are those of ``byline evaluate head``:
what the prompt is about, whose picture the teacher names first, how far the query is from everything that was taught;
none of them looks at a head. Slices have few queries, so only one that is *surely* worse refuses: the upper end of a
one-sided interval (Student's t), corrected for how many slices are looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from byline.evaluation.head_report import TEXT_FEATURES
from byline.evaluation.head_slices import creator_of_top, distance_thirds, prompt_clusters
from byline.teachers.racing import student_quantile
from services.trainer.labels import RefreshLabels

DoubleArray = npt.NDArray[np.float64]
Cuts = Mapping[str, Sequence[str]]

#: Of fewer queries nothing is said.
MINIMUM_QUERIES = 8


@dataclass(frozen=True)
class SliceVerdict:
    """One kind of held-out queries: ``gain`` of mAP over the active head, at ``confidence`` no more than ``at_most``.

    ``at_most`` None: there are too few queries to judge.
    """

    cut: str
    name: str
    queries: int
    gain: float
    at_most: float | None

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        judged = self.at_most is not None
        return {"cut": self.cut, "name": self.name, "queries": self.queries, "gain": self.gain,
                "gain_at_most": self.at_most,
                "not_judged": None if judged else f"fewer than {MINIMUM_QUERIES} queries"}  # fmt: skip


def judge_slices(cuts: Cuts, candidate: DoubleArray, active: DoubleArray, confidence: float
                 ) -> tuple[SliceVerdict, ...]:
    """Compare AP per query [q] of both heads; ``cuts[cut]`` names the slice of every query.

    With ``confidence`` none of the judged slices has a gain above its ``at_most`` by luck alone.
    """
    difference = candidate - active
    found = [(cut, name, difference[np.asarray(names) == name]) for cut, names in cuts.items()
             for name in dict.fromkeys(names)]  # fmt: skip
    judged = sum(len(gains) >= MINIMUM_QUERIES for _, _, gains in found)
    level = 1.0 - (1.0 - confidence) / max(judged, 1)
    return tuple(
        SliceVerdict(cut, name, len(gains), float(gains.mean()),
                     _at_most(gains, level) if len(gains) >= MINIMUM_QUERIES else None)
        for cut, name, gains in found
    )


def _at_most(gains: DoubleArray, level: float) -> float:
    error = float(gains.std(ddof=1)) / np.sqrt(len(gains))
    return float(gains.mean() + student_quantile(level, len(gains) - 1) * error)


def cuts_of(labels: RefreshLabels, blocks: Sequence[tuple[str, int]], seed: int) -> dict[str, list[str]]:
    """The slice of every held-out query that has a mAP, by prompt cluster (where there is a text feature), creator and
    distance; nothing where no slice could have enough queries."""
    train, held_out = labels.train, labels.held_out
    ranked = np.flatnonzero((~np.isnan(held_out.tau)).sum(1) >= 2)
    if len(ranked) < MINIMUM_QUERIES:
        return {}
    cuts: dict[str, list[str]] = {}
    start = 0
    for name, width in blocks:
        if name in TEXT_FEATURES:
            columns = slice(start, start + width)
            cuts["prompt"] = prompt_clusters(train.query_features[:, columns], [one.prompt for one in
                                             labels.train_rankings], held_out.query_features[ranked, columns],
                                             seed=seed)
        start += width
    cuts["creator of the teacher's first item"] = creator_of_top(
        held_out.tau[ranked], [item.creator for item in labels.items]
    )
    cuts["distance to the training queries"] = distance_thirds(train.query_features, held_out.query_features[ranked])
    return cuts
