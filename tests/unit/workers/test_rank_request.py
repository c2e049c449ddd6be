"""What curation may ask of a ranking job."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from byline.errors import InvalidRequest
from services.workers.ranking import WHOLE_CORPUS, RankRequest

QUERY = "0b5fbe4e-2f62-4fc2-8e0d-8bb6a2c7b1f4"


def parse(**payload: Any) -> RankRequest:
    return RankRequest.of(payload, teacher="abu_plus_linear", draws=64)


def test_a_payload_overrides_the_defaults() -> None:
    request = parse(
        query_id=QUERY, teacher="abu_plus", draws=16, candidate_ids=["3", 1], teacher_settings={"noise": "shared"}
    )
    assert request.query_id == uuid.UUID(QUERY)
    assert (request.teacher, request.draws, request.candidate_ids) == ("abu_plus", 16, (3, 1))
    assert request.teacher_settings == {"noise": "shared"}


def test_without_candidates_the_whole_corpus_is_ranked() -> None:
    request = parse(query_id=QUERY)
    assert (request.candidate_ids, request.candidate_set) == (None, WHOLE_CORPUS)
    assert (request.teacher, request.draws) == ("abu_plus_linear", 64)


def test_unnamed_lists_share_a_name_only_if_they_hold_the_same_items() -> None:
    names = [parse(query_id=QUERY, candidate_ids=ids).candidate_set for ids in ([1, 2, 3], [3, 1, 2], [1, 2])]
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize(
    "payload",
    [
        {},
        {"query_id": "not-a-uuid"},
        {"query_id": QUERY, "candidate_ids": ["x"]},
        {"query_id": QUERY, "draws": "many"},
        {"query_id": QUERY, "candidate_set": "nearest-400"},
    ],
)
def test_a_request_that_makes_no_sense_is_refused_for_good(payload: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        RankRequest.of(payload, teacher="abu_plus_linear", draws=64)
