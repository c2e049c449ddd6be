"""What an answer says of its own certainty."""

from __future__ import annotations

from typing import Any

import pytest

from services.workers.calibration import is_attributable, probability_of

CURVE: dict[str, Any] = {
    "cosine": [0.0, 0.5, 1.0],
    "probability": [0.1, 0.4, 0.9],
    "low": [0.0, 0.3, 0.8],
    "high": [0.2, 0.5, 1.0],
    "noise_floor": 0.25,
}


def test_probability_rises_with_the_cosine_and_lies_in_its_interval() -> None:
    found = [probability_of(CURVE, cosine) for cosine in (-1.0, 0.0, 0.25, 0.5, 0.9, 2.0)]
    values = [one[0] for one in found if one is not None]
    assert values == sorted(values) and len(values) == 6
    assert all(one is not None and 0 <= one[1] <= one[0] <= one[2] <= 1 for one in found)


@pytest.mark.parametrize("calibrator", [{}, {"cosine": [0.0, 1.0]}, {**CURVE, "low": [0.1]}])
def test_a_release_without_calibration_claims_no_probability(calibrator: dict[str, Any]) -> None:
    assert probability_of(calibrator, 0.5) is None


def test_nothing_above_the_noise_floor_is_not_attributable() -> None:
    assert not is_attributable(CURVE, [0.2, 0.1])
    assert is_attributable(CURVE, [0.3, 0.1])


def test_without_a_noise_floor_only_an_empty_answer_is_not_attributable() -> None:
    assert is_attributable({}, [-0.9])
    assert not is_attributable({}, [])
