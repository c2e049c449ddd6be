"""Fit and judge the noise floor: when an answer must say "not attributable".

Why it exists: the best score alone is a poor witness. It is high for any image under a prompt the corpus knows, and
low for the model's own images under new prompts; so evidence on the query (``features/prompt_gain``) decides first
and the score second. What is reported is judged on queries and nulls that were not fitted on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from byline.errors import LabelsNotUsable
from byline.evaluation.calibration import Abstention, Evidence

DoubleArray = npt.NDArray[np.float64]
#: A score that would refuse more of the real queries than this, to keep its promise on nulls, is no witness by itself.
MOST_REFUSED = 0.5


@dataclass(frozen=True)
class Nulls:
    """Null queries as a release sees them: ``best`` [m] score of the best item and ``evidence`` [m] or None.

    ``kind`` and ``source`` [m] name them; nulls of one source stay together when they are split.
    """

    kind: tuple[str, ...]
    source: tuple[str, ...]
    best: DoubleArray
    evidence: DoubleArray | None

    def of(self, rows: npt.NDArray[Any]) -> Nulls:
        """Those of an index or mask [m]."""
        places = np.arange(len(self.kind))[rows]
        return Nulls(tuple(self.kind[p] for p in places), tuple(self.source[p] for p in places), self.best[places],
                     None if self.evidence is None else self.evidence[places])


def fit_abstention(nulls: Nulls, best: DoubleArray, evidence: DoubleArray | None, *, encoder: tuple[str, str],
                   allowed: float = 0.05) -> Abstention:
    """Floors that let at most a share ``allowed`` of each kind of nulls pass, as far as ``nulls`` show.

    Beside evidence, the floor of the score alone is left out where it would refuse most real queries.
    ``best``, ``evidence`` [q] are of real held-out queries; ``encoder`` is (name, preprocessing hash) of the
    evidence. LabelsNotUsable without nulls or queries.
    """
    if not len(nulls.kind) or not len(best):
        raise LabelsNotUsable("a noise floor needs null queries and held-out real ones")
    alone = _floor(nulls, nulls.best, allowed)
    if nulls.evidence is None or evidence is None:
        return Abstention(alone, alone)
    # Where real queries and nulls do not meet, anything between them keeps the promise; the middle keeps it longest.
    limit, lowest = _floor(nulls, nulls.evidence, allowed), float(evidence.min())
    highest = float(nulls.evidence.max())
    limit = (highest + lowest) / 2 if highest < lowest else limit
    passing = np.where(nulls.evidence >= limit, nulls.best, -np.inf)
    floor = _floor(nulls, passing, allowed)
    # No null is left for the score to refuse: it only has to be one that has been seen at all.
    seen = float(min(best.min(), nulls.best.min()))
    useful = float((best < alone).mean()) <= MOST_REFUSED
    return Abstention(max(floor, seen), alone if useful else None, Evidence(*encoder, limit))


def _floor(nulls: Nulls, values: DoubleArray, allowed: float) -> float:
    """The smallest value that at most ``allowed`` of every kind reaches (split-conformal order statistic)."""
    kinds = np.asarray(nulls.kind)
    floors = []
    for kind in sorted(set(nulls.kind)):
        ordered = np.sort(values[kinds == kind])
        place = math.ceil(round((len(ordered) + 1) * (1.0 - allowed), 9))
        reached = ordered[min(place, len(ordered)) - 1]
        floors.append(float(np.nextafter(reached, np.inf)) if np.isfinite(reached) else -np.inf)
    return max(floors)


def judge_by_sources(nulls: Nulls, best: DoubleArray, evidence: DoubleArray | None, *, encoder: tuple[str, str],
                     allowed: float = 0.05) -> npt.NDArray[np.bool_]:
    """[m]: whether a null passes under an abstention fitted on the nulls of *other* sources (two folds)."""
    fold = _folds(nulls)
    passed = np.zeros(len(nulls.kind), dtype=bool)
    for number in (0, 1):
        fitted = fit_abstention(nulls.of(fold != number), best, evidence, encoder=encoder, allowed=allowed)
        held = nulls.of(fold == number)
        passed[fold == number] = fitted.attributes(held.best, held.evidence)
    return passed


def judge_unseen_kinds(nulls: Nulls, best: DoubleArray, evidence: DoubleArray | None, *, encoder: tuple[str, str],
                       allowed: float = 0.05) -> dict[str, float]:
    """For each kind the share that passes when the floors were fitted on the other kinds alone."""
    kinds = np.asarray(nulls.kind)
    out = {}
    for kind in sorted(set(nulls.kind)):
        rest, held = nulls.of(kinds != kind), nulls.of(kinds == kind)
        if len(rest.kind):
            fitted = fit_abstention(rest, best, evidence, encoder=encoder, allowed=allowed)
            out[kind] = float(fitted.attributes(held.best, held.evidence).mean())
    return out


@dataclass(frozen=True)
class AbstentionReport:
    """``false_attribution`` by kind and ``pooled``, of nulls whose source was not fitted on; ``nulls`` counts them.

    ``unseen_kind``: the same where the whole kind was not fitted on. ``refused``: share of real held-out queries
    that are refused, with ``refused_alone`` if the score alone were asked; ``shuffled_passed``: of real images
    under other queries' prompts. ``surely_above`` is a 95 % lower bound of ``pooled``
    (Clopper & Pearson, Biometrika 1934).
    """

    false_attribution: dict[str, float]
    pooled: float
    surely_above: float
    nulls: int
    unseen_kind: dict[str, float]
    false_attribution_alone: float
    refused: float
    refused_alone: float
    queries: int
    shuffled_passed: float | None

    def to_json(self) -> dict[str, Any]:
        """As kept in a release's metrics."""
        return dict(self.__dict__)


def report_abstention(
    fitted: Abstention, nulls: Nulls, fit_on: tuple[DoubleArray, DoubleArray | None],
    judged: tuple[DoubleArray, DoubleArray | None], shuffled: tuple[DoubleArray, DoubleArray] | None = None, *,
    encoder: tuple[str, str], allowed: float = 0.05,
) -> AbstentionReport:  # fmt: skip
    """Judge on held-out nulls and on ``judged`` real queries; pairs are (best score [q], evidence [q] or None)."""
    passed = judge_by_sources(nulls, *fit_on, encoder=encoder, allowed=allowed)
    alone = judge_by_sources(Nulls(nulls.kind, nulls.source, nulls.best, None), fit_on[0], None, encoder=encoder,
                             allowed=allowed)
    kinds, count = np.asarray(nulls.kind), int(passed.sum())
    return AbstentionReport(
        {kind: float(passed[kinds == kind].mean()) for kind in sorted(set(nulls.kind))}, float(passed.mean()),
        surely_above(count, len(passed)), len(passed),
        judge_unseen_kinds(nulls, *fit_on, encoder=encoder, allowed=allowed), float(alone.mean()),
        float((~fitted.attributes(*judged)).mean()), float((judged[0] < _floor(nulls, nulls.best, allowed)).mean()),
        len(judged[0]), None if shuffled is None else float(fitted.attributes(*shuffled).mean()),
    )


def surely_above(count: int, of: int, confidence: float = 0.95) -> float:
    """The one-sided lower confidence bound of a proportion, ``count`` out of ``of`` (Clopper & Pearson)."""
    if count == 0:
        return 0.0
    low, high = 0.0, count / of
    for _ in range(60):
        middle = (low + high) / 2
        fewer = sum(math.comb(of, k) * middle**k * (1 - middle) ** (of - k) for k in range(count))
        low, high = (middle, high) if 1.0 - fewer < 1.0 - confidence else (low, middle)
    return low


def _folds(nulls: Nulls) -> npt.NDArray[np.int64]:
    """0 or 1 per null: the sources of each kind in turn, so that both folds hold every kind."""
    fold = np.zeros(len(nulls.kind), dtype=np.int64)
    for kind in set(nulls.kind):
        places = [p for p, known in enumerate(nulls.kind) if known == kind]
        order = {source: n for n, source in enumerate(dict.fromkeys(nulls.source[p] for p in places))}
        for p in places:
            fold[p] = order[nulls.source[p]] % 2
    return fold
