"""The transition table and the stages, as facts."""

from __future__ import annotations

import itertools

import pytest

from byline.errors import IllegalTransition
from byline.jobs.states import (
    TERMINAL,
    TRANSITIONS,
    Kind,
    Stage,
    State,
    Tier,
    check_transition,
    first_stage,
    next_stage,
    stages,
)


def test_every_state_has_its_row_in_the_table():
    assert set(TRANSITIONS) == set(State)


def test_a_terminal_state_is_never_left():
    for state in TERMINAL:
        assert TRANSITIONS[state] == frozenset()


def test_every_state_but_a_terminal_one_leads_to_a_terminal_one():
    for state in set(State) - TERMINAL:
        assert TRANSITIONS[state] & TERMINAL


def test_only_a_cancelled_job_follows_a_cancelling_one():
    assert TRANSITIONS[State.CANCELLING] == {State.CANCELLED}


@pytest.mark.parametrize(("before", "after"), list(itertools.product(State, State)))
def test_check_transition_agrees_with_the_table(before: State, after: State):
    if after in TRANSITIONS[before]:
        check_transition(before, after)
    else:
        with pytest.raises(IllegalTransition) as raised:
            check_transition(before, after)
        assert raised.value.metadata == {"from_state": before.value, "to_state": after.value}


@pytest.mark.parametrize("tier", list(Tier))
def test_the_stages_of_a_tier_are_walked_by_next_stage(tier: Tier):
    walked, stage = [], first_stage(Kind.ATTRIBUTION)
    while stage is not None:
        walked.append(stage)
        stage = next_stage(stage, tier)
    assert tuple(walked) == stages(Kind.ATTRIBUTION, tier)
    assert walked[0] is Stage.LOOKUP


def test_a_retrieved_answer_needs_the_lookup_only():
    assert stages(Kind.ATTRIBUTION, Tier.RETRIEVED) == (Stage.LOOKUP,)


def test_a_verified_answer_ends_with_the_teacher():
    assert stages(Kind.ATTRIBUTION, Tier.VERIFIED)[-1] is Stage.VERIFY


@pytest.mark.parametrize("tier", list(Tier))
def test_a_ranking_job_has_one_stage_whatever_its_tier(tier: Tier):
    assert first_stage(Kind.RANKING) is Stage.RANK
    assert next_stage(Stage.RANK, tier) is None
    assert stages(Kind.RANKING, tier) == (Stage.RANK,)
