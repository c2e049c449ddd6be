"""From a student's scores to "P(among the teacher's first L)", and to "not attributable": a release's calibrator.

Why it exists: an inner product orders items and says nothing else. What it is worth was measured on held-out
queries and travels with the release as ``calibrator.json``; here it is applied, with numpy alone, to one retrieved
list. Fitted by ``calibration_fit`` and ``abstention``. A probability is always of being among the teacher's first L,
never a share of an image.

Format 2 of the file: ``{"format": 2, "kind": "isotonic_margin", "top": L, "reference_rank": r, "coverage": c,
"curve": {"margin": [...], "probability": [...]}, "interval": {"edge": [...], "low": [...], "high": [...]},
"abstention": {...} or null}``. The older form (knots ``cosine``, ``probability``, ``low``, ``high`` and a
``noise_floor`` on the best score), ``{"kind": "none"}`` and ``{}`` are read as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from byline.errors import ReleaseCorrupt

DoubleArray = npt.NDArray[np.float64]
FORMAT = 2
KIND = "isotonic_margin"


class Probability(NamedTuple):
    """P(the item is among the teacher's first ``top``), the interval around it, and how often the interval holds.

    ``top`` is 0 where the release does not say.
    """

    value: float
    low: float
    high: float
    coverage: float | None
    top: int = 0


def scale_free_margins(scores: DoubleArray, first: DoubleArray) -> DoubleArray:
    """[..., n]: scores over that of the item at rank r, in units of the mean excess of the query's first r items.

    ``scores`` [..., n]; ``first`` [..., r] are the query's r highest, in any order. Neither a level nor a positive
    factor of a query's scores, or of a head's, changes a margin: an inner product means something only beside the
    others of its query. The item at rank r has margin 0, the first r have 1 on average; all 0 if these are all equal.
    """
    reference = first.min(-1, keepdims=True)
    spread = first.mean(-1, keepdims=True) - reference
    # Relative to the level, for the mean of equal scores is not always the score itself.
    some = spread > 1e-12 * np.maximum(np.abs(reference), np.abs(first).max(-1, keepdims=True))
    return np.asarray(np.where(some, (scores - reference) / np.where(some, spread, 1.0), 0.0))


@dataclass(frozen=True)
class Curve:
    """Monotone knots from margin to probability, and an interval per range of margins.

    Margins are those of :func:`scale_free_margins` over the first ``reference_rank`` retrieved items (0: the score
    itself, of the first format). ``edges`` ascending [b - 1] part the margins into b ranges with ``low``, ``high`` [b].
    """

    reference_rank: int
    margin: DoubleArray
    probability: DoubleArray
    edges: DoubleArray
    low: DoubleArray
    high: DoubleArray
    coverage: float | None

    def margins(self, scores: DoubleArray) -> DoubleArray:
        """Margins [k] of one query's retrieved scores [k], best first; a shorter list refers to its last item."""
        if self.reference_rank == 0 or scores.shape[0] == 0:
            return scores
        return scale_free_margins(scores, scores[: self.reference_rank])

    def at(self, margins: DoubleArray) -> tuple[DoubleArray, DoubleArray, DoubleArray]:
        """Probability, low and high, each of the shape of ``margins``; low ≤ probability ≤ high."""
        value = np.interp(margins, self.margin, self.probability)
        place = np.searchsorted(self.edges, margins, side="right")
        return value, np.minimum(self.low[place], value), np.maximum(self.high[place], value)


@dataclass(frozen=True)
class Evidence:
    """That an image is this model's own, made from this prompt: the encoder that says so, and what it must say.

    ``preprocessing_hash`` binds the limit to the encoder it was measured with.
    """

    encoder: str
    preprocessing_hash: str
    limit: float


@dataclass(frozen=True)
class Abstention:
    """When to say "not attributable".

    An answer attributes if its best score is at least ``floor`` *and* the evidence for the query reaches its limit.
    Where there is no evidence (a query by embedding, or without a prompt) the score has to reach ``floor_alone``; None
    if the score alone tells too little: then nothing is said of such a query.
    """

    floor: float
    floor_alone: float | None
    evidence: Evidence | None = None

    def floor_for(self, evident: bool) -> float | None:
        """The score that the best item must reach; ``evident`` says whether the query's evidence is known."""
        return self.floor if evident or self.evidence is None else self.floor_alone

    def attributes(self, best: DoubleArray, evidence: npt.NDArray[Any] | None) -> npt.NDArray[np.bool_]:
        """[q] of best scores [q] and evidence [q], or None where it is not known; True where nothing can be said."""
        floor = self.floor_for(evidence is not None)
        above = np.asarray(best >= (-np.inf if floor is None else floor))
        if self.evidence is None or evidence is None:
            return above
        return np.asarray(above & (evidence >= self.evidence.limit))


@dataclass(frozen=True)
class Calibrator:
    """What a release says of its own certainty. ``top`` is L; both parts may be missing."""

    curve: Curve | None = None
    abstention: Abstention | None = None
    top: int = 0

    @property
    def depth(self) -> int:
        """How many items must be retrieved, at least, for margins to be those of the fit."""
        return self.curve.reference_rank if self.curve is not None else 0

    def probabilities(self, scores: Sequence[float]) -> list[Probability | None]:
        """One for each retrieved score, best first; None where the release has no calibration."""
        if self.curve is None:
            return [None] * len(scores)
        margins = self.curve.margins(np.asarray(scores, dtype=np.float64))
        found = zip(*(part.tolist() for part in self.curve.at(margins)), strict=True)
        return [Probability(value, low, high, self.curve.coverage, self.top) for value, low, high in found]

    @property
    def evidence_floor(self) -> float | None:
        """The evidence below which nothing is attributed, or None if none is asked for."""
        asked = None if self.abstention is None else self.abstention.evidence
        return None if asked is None else asked.limit

    def noise_floor(self, evident: bool = True) -> float | None:
        """The score below which nothing is attributed, or None if nothing can be said of such a query."""
        return None if self.abstention is None else self.abstention.floor_for(evident)

    def attributes(self, scores: Sequence[float], evidence: float | None = None) -> bool:
        """Whether anything rises above the noise floor, or there is none; an empty answer attributes nothing.

        ``evidence`` is the query's, None where it is not known.
        """
        if not len(scores):
            return False
        if self.abstention is None:
            return True
        known = None if evidence is None else np.asarray([evidence])
        return bool(self.abstention.attributes(np.asarray([max(scores)]), known)[0])

    def to_json(self) -> dict[str, Any]:
        """As kept in ``calibrator.json``."""
        curve, abstention = self.curve, self.abstention
        if curve is None and abstention is None:
            return {"format": FORMAT, "kind": "none"}
        return {
            "format": FORMAT, "kind": KIND if curve is not None else "none", "top": self.top,
            **({} if curve is None else {
                "reference_rank": curve.reference_rank, "coverage": curve.coverage,
                "curve": {"margin": curve.margin.tolist(), "probability": curve.probability.tolist()},
                "interval": {"edge": curve.edges.tolist(), "low": curve.low.tolist(), "high": curve.high.tolist()},
            }),
            "abstention": None if abstention is None else {
                "noise_floor": abstention.floor, "noise_floor_without_evidence": abstention.floor_alone,
                "evidence": None if abstention.evidence is None else asdict(abstention.evidence),
            },
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Calibrator:
        """Read any format. ReleaseCorrupt for a format of the future or one that does not fit together."""
        try:
            if "format" not in value:
                return _first_format(value)
            if value["format"] != FORMAT:
                raise ReleaseCorrupt(f"calibrator.json has format {value['format']}, this version reads {FORMAT}")
            floors = value.get("abstention")
            abstention = None if floors is None else Abstention(
                float(floors["noise_floor"]), _maybe(floors["noise_floor_without_evidence"]),
                None if floors.get("evidence") is None else _evidence(floors["evidence"]))
            if value["kind"] != KIND:
                return cls(None, abstention, int(value.get("top", 0)))
            curve, interval = value["curve"], value["interval"]
            parts = [_array(curve["margin"]), _array(curve["probability"]), _array(interval["edge"]),
                     _array(interval["low"]), _array(interval["high"])]
            if len(parts[0]) != len(parts[1]) or not len(parts[0]) or {len(parts[3]), len(parts[4])} != {
                    len(parts[2]) + 1}:
                raise ReleaseCorrupt("calibrator.json has lists of lengths that do not fit together")
            margin, probability, edges, low, high = parts
            read = Curve(int(value["reference_rank"]), margin, probability, edges, low, high, value.get("coverage"))
            return cls(read, abstention, int(value.get("top", 0)))
        except (KeyError, TypeError, ValueError) as error:
            raise ReleaseCorrupt(f"calibrator.json cannot be read: {error!r}") from error


def _first_format(value: Mapping[str, Any]) -> Calibrator:
    """Knots on the score itself and a floor on the best score; every key may be missing."""
    knots, floor = value.get("cosine"), value.get("noise_floor")
    abstention = None if floor is None else Abstention(float(floor), float(floor))
    names = ("probability", "low", "high")
    if not knots or any(len(value.get(name) or ()) != len(knots) for name in names):
        return Calibrator(None, abstention)
    margin, (probability, low, high) = _array(knots), (_array(value[name]) for name in names)
    edges = (margin[1:] + margin[:-1]) / 2
    return Calibrator(Curve(0, margin, probability, edges, low, high, value.get("coverage")), abstention)


def _maybe(value: Any) -> float | None:
    return None if value is None else float(value)


def _evidence(value: Mapping[str, Any]) -> Evidence:
    return Evidence(str(value["encoder"]), str(value["preprocessing_hash"]), float(value["limit"]))


def _array(values: Sequence[float]) -> DoubleArray:
    return np.asarray(values, dtype=np.float64)
