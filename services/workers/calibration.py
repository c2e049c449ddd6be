"""From a cosine to a probability, and to "not attributable": reading a release's ``calibrator.json``.

Why it exists: the numbers belong to the release (they were measured on its held-out queries), the reading of
them to the worker. A release without a calibrator answers without probabilities and never abstains.

``calibrator.json``: ``{"cosine": [...], "probability": [...], "low": [...], "high": [...], "coverage": 0.9,
"noise_floor": x}``; the lists are knots of monotone curves (ascending cosine), ``coverage`` is the interval's, and
``noise_floor`` the cosine below which nothing rises above chance. Every key may be missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_CURVES = ("probability", "low", "high")


class Probability(NamedTuple):
    """P(the item is in the teacher's top L), the interval around it, and how often the interval holds."""

    value: float
    low: float
    high: float
    coverage: float | None


def probability_of(calibrator: Mapping[str, Any], cosine: float) -> Probability | None:
    """The calibrated probability of an influence with this cosine, or None if the release has no calibration."""
    knots = calibrator.get("cosine")
    if not knots or any(len(calibrator.get(name) or ()) != len(knots) for name in _CURVES):
        return None
    value, low, high = (float(np.interp(cosine, knots, calibrator[name])) for name in _CURVES)
    return Probability(value, min(low, value), max(high, value), calibrator.get("coverage"))


def noise_floor_of(calibrator: Mapping[str, Any]) -> float | None:
    """The cosine below which nothing rises above chance, or None if it was not measured."""
    floor = calibrator.get("noise_floor")
    return None if floor is None else float(floor)


def is_attributable(calibrator: Mapping[str, Any], cosines: Sequence[float]) -> bool:
    """Whether the best cosine rises above the release's noise floor; an empty answer attributes nothing."""
    floor = noise_floor_of(calibrator)
    return bool(cosines) and (floor is None or max(cosines) >= floor)
