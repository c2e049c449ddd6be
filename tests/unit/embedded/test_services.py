"""The list of services and the restart rule."""

from __future__ import annotations

import sys

import pytest

from byline.embedded.services import HEALTHY_AFTER_S, LONGEST_DELAY_S, NAMES, CrashCount, chosen, restart_delay_s
from byline.errors import InvalidRequest


def test_services_start_in_one_order_however_they_are_asked_for() -> None:
    assert [service.name for service in chosen(["trainer", "gateway"])] == ["gateway", "trainer"]
    assert [service.name for service in chosen(NAMES)] == list(NAMES)
    assert chosen(["lookup"])[0].command() == [sys.executable, "-m", "services.workers", "lookup"]


def test_an_unknown_service_is_named_in_the_error() -> None:
    with pytest.raises(InvalidRequest, match="gatway"):
        chosen(["gatway"])


def test_a_crashing_service_is_started_ever_more_rarely_but_never_given_up() -> None:
    delays = [restart_delay_s(crash) for crash in range(1, 30)]
    assert delays[0] < 1
    assert delays == sorted(delays)
    assert delays[-1] == LONGEST_DELAY_S


def test_a_service_that_ran_well_is_forgiven_its_crashes() -> None:
    crashes = CrashCount()
    for _ in range(5):
        crashes.ended(ran_s=0.1)
    assert crashes.in_a_row == 5
    assert crashes.ended(ran_s=HEALTHY_AFTER_S + 1) == restart_delay_s(1)
    assert (crashes.in_a_row, crashes.in_all) == (1, 6)
