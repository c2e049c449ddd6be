"""A near-duplicate group takes one place in an answer, whichever of its items are left."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

from byline.jobs.model import StageResult
from byline.jobs.states import Stage
from services.gateway import convert
from services.workers.answer import end_of_groups, group_ranks, retrieved_answer

NOW = datetime(2026, 1, 1, tzinfo=UTC)
#: (item, group), most influential first.
FOUND = [(1, 1), (2, 2), (3, 1), (4, 4), (5, 2), (6, 6)]


def _answer(top_k: int, apart: bool, withdrawn: frozenset[int] = frozenset()) -> Any:
    groups = [str(group) for _, group in FOUND]
    ranks = group_ranks(groups, apart)
    influences = [
        {"item_id": str(item), "rank": rank, "near_duplicate_group": group, "cosine": 1.0 - n / 10}
        for n, ((item, _), group, rank) in enumerate(zip(FOUND, groups, ranks, strict=True))
    ]
    result = retrieved_answer(
        influences, top_k=top_k, release_id="r1", model_revision="m", not_attributable=False, noise_floor=None,
        timings_ms={}, apart=apart, delta_sequence=3, corpus_sequence=7,
    )  # fmt: skip
    job = SimpleNamespace(model_id="m", top_k=top_k, id=uuid.uuid4())
    stored = StageResult(stage=Stage.LOOKUP, release_id="r1", fence=1, result=result, created_at=NOW)
    return convert._answer(job, stored, "c", withdrawn)  # type: ignore[arg-type]


def _listed(answer: Any) -> list[tuple[int, int, list[int]]]:
    return [(one.item_id, one.rank, list(one.copies)) for one in answer.influences]


def test_copies_stand_beside_the_first_of_their_group_and_take_no_place():
    assert _listed(_answer(3, apart=False)) == [(1, 1, [3]), (2, 2, [5]), (4, 3, [])]
    assert _listed(_answer(3, apart=True)) == [(1, 1, []), (2, 2, []), (3, 3, [])]


def test_where_the_first_was_withdrawn_a_copy_takes_its_place():
    assert _listed(_answer(3, apart=False, withdrawn=frozenset({1}))) == [(2, 1, [5]), (3, 2, []), (4, 3, [])]
    assert _answer(3, apart=False, withdrawn=frozenset({1})).withdrawn_influences == 1


def test_an_answer_names_the_additions_it_has_seen():
    answer = _answer(3, apart=False)
    assert (answer.delta_sequence, answer.corpus_sequence) == (3, 7)


def test_a_list_ends_where_one_group_too_many_begins():
    groups = [group for _, group in FOUND]
    assert [end_of_groups(groups, wanted) for wanted in (1, 2, 3, 4, 9)] == [1, 3, 5, 6, 6]
    assert end_of_groups(groups, 4, apart=True) == 4
    assert group_ranks(groups) == [1, 2, 1, 3, 2, 4]
