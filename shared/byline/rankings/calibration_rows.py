"""Brings together what a release's calibrator is fitted on: held-out queries, null queries, their evidence.

Why it exists: ``byline.evaluation.calibrate`` takes scores; the trainer and ``byline evaluate calibration`` have
rankings and a head, and must do the same with them. Queries are embedded by a function and items' vectors are taken
as they will be indexed, so nothing here knows what a head is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from byline.evaluation.calibrate import Calibration, ScoredNulls, ScoredQueries, fit_calibrator
from byline.evaluation.null_queries import with_other_prompts
from byline.ranker.labelled_set import LabelledSet
from byline.rankings.features import Asked
from byline.rankings.query_evidence import NullRows

FloatArray = npt.NDArray[np.float32]
Embed = Callable[[FloatArray], FloatArray]


class QueryRows(Protocol):
    """Features of queries; ``byline.rankings.features.LabelFeatures`` is one."""

    def of_queries(self, rankings: Sequence[Asked], progress: Callable[[int, int], None]) -> FloatArray:
        """[q, in] in the order of ``rankings``."""
        ...


class EvidenceRows(Protocol):
    """Evidence of queries, and null queries; ``byline.rankings.query_evidence.QueryEvidence`` is one."""

    @property
    def encoder(self) -> tuple[str, str]:
        """Name and preprocessing hash of what makes the evidence."""
        ...

    def of_queries(self, rankings: Sequence[Asked], progress: Callable[[int, int], None]) -> FloatArray:
        """[q] in the order of ``rankings``."""
        ...

    def nulls(self, captions: Sequence[str], progress: Callable[[int, int], None]) -> NullRows:
        """Null queries with prompts out of ``captions``."""
        ...


@dataclass(frozen=True)
class HeldOut:
    """Queries no head was trained on, with the rankings they come from, in the same order."""

    labelled: LabelledSet
    rankings: Sequence[Asked]


@dataclass(frozen=True)
class CalibrationRows:
    """Where rows come from. Without ``evidence`` there are probabilities, but no noise floor."""

    features: QueryRows
    evidence: EvidenceRows | None
    captions: Sequence[str]
    progress: Callable[[str, int, int], None]


def calibrate(embed: Embed, vectors: FloatArray, validation: HeldOut, test: HeldOut | None, rows: CalibrationRows, *,
              top: int, seed: int) -> Calibration:
    """Fit on ``validation``, judge on ``test`` (None: there are too few).

    ``embed`` maps query features [q, in] to embeddings [q, d]; ``vectors`` [n, d] are the items', in the order of
    the labelled sets; ``top`` is L.
    """
    source = rows.evidence

    def scores(features: FloatArray) -> FloatArray:
        return np.asarray(embed(features) @ vectors.T, dtype=np.float32)

    def scored(held: HeldOut) -> ScoredQueries:
        evidence = None if source is None else source.of_queries(held.rankings, _step(rows, "evidence of queries"))
        return ScoredQueries(scores(held.labelled.query_features), held.labelled.tau, evidence)

    nulls, shuffled = None, None
    if source is not None:
        found = source.nulls(rows.captions, _step(rows, "null queries"))
        nulls = ScoredNulls(found.kind, found.source, scores(found.features).max(1).astype(np.float64),
                            found.evidence.astype(np.float64))
        others = with_other_prompts((test or validation).rankings)
        if others:
            swapped = scores(rows.features.of_queries(others, _step(rows, "shuffled prompts"))).max(1)
            evidence = source.of_queries(others, _step(rows, "shuffled prompts"))
            shuffled = swapped.astype(np.float64), evidence.astype(np.float64)
    judged = None if test is None else scored(test)
    return fit_calibrator(scored(validation), judged, nulls, top=top, seed=seed, shuffled=shuffled,
                          encoder=("", "") if source is None else source.encoder)


def _step(rows: CalibrationRows, what: str) -> Callable[[int, int], None]:
    return lambda done, total: rows.progress(what, done, total)
