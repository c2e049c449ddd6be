"""Which errors are worth another attempt, and when it comes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from byline import errors
from byline.jobs.retry import FIRST_DELAY_S, LONGEST_DELAY_S, is_retryable, retry_delay_s


@pytest.mark.parametrize(
    "error",
    [
        errors.ImageUndecodable("image", "broken"),
        errors.BlobNotFound("gone"),
        errors.ReleaseNotEligible("rejected"),
        errors.TeacherNotUsable("factors"),
        errors.DeadlineExceeded("late"),
        errors.JobCancelled("asked"),
    ],
)
def test_an_error_that_comes_back_every_time_is_not_tried_again(error: errors.BylineError):
    assert not is_retryable(error)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("unknown"),
        MemoryError(),
        errors.DatabaseUnavailable("away"),
        errors.NoActiveRelease("soon"),
        errors.ItemWithdrawn("again without it"),
        errors.BylineError("unknown"),
    ],
)
def test_an_error_that_may_pass_is_tried_again(error: Exception):
    assert is_retryable(error)


@given(attempt=st.integers(1, 1000), seed=st.integers(0, 2**32))
def test_the_delay_stays_between_half_its_ceiling_and_its_ceiling(attempt: int, seed: int):
    ceiling = min(FIRST_DELAY_S * 2.0 ** min(attempt - 1, 16), LONGEST_DELAY_S)
    assert ceiling / 2 <= retry_delay_s(attempt, random.Random(seed)) <= ceiling


def test_delays_of_jobs_that_failed_together_differ():
    rng = random.Random(7)
    assert len({retry_delay_s(1, rng) for _ in range(20)}) == 20
