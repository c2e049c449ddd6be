"""What curation may ask of a ranking job."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from byline.errors import InvalidRequest
from services.workers.rank_request import WHOLE_CORPUS, RankRequest, Wanted

QUERY = "0b5fbe4e-2f62-4fc2-8e0d-8bb6a2c7b1f4"
OTHER = "6a1f0b0e-51d2-4b7e-9f3e-1c2d3e4f5a6b"


def parse(**payload: Any) -> RankRequest:
    return RankRequest.of(payload, teacher="abu_plus_linear", draws=64)


def test_a_payload_overrides_the_defaults() -> None:
    request = parse(
        query_ids=[QUERY, OTHER], teacher="abu_plus", draws=16, candidate_set="nearest-2", candidate_ids=["3", 1],
        teacher_settings={"noise": "shared"},
    )  # fmt: skip
    assert request.wanted == tuple(Wanted(uuid.UUID(query), "nearest-2", (3, 1)) for query in (QUERY, OTHER))
    assert (request.teacher, request.draws) == ("abu_plus", 16)
    assert request.teacher_settings == {"noise": "shared"}


def test_the_form_of_older_jobs_asks_for_one_query() -> None:
    assert parse(query_id=QUERY, candidate_ids=[2]).wanted == parse(query_ids=[QUERY], candidate_ids=[2]).wanted


def test_without_candidates_the_whole_corpus_is_ranked() -> None:
    request = parse(query_ids=[QUERY])
    assert request.wanted == (Wanted(uuid.UUID(QUERY), WHOLE_CORPUS, None),)
    assert (request.teacher, request.draws) == ("abu_plus_linear", 64)


def test_every_query_may_bring_candidates_of_its_own() -> None:
    request = parse(query_ids=[QUERY, OTHER], candidate_ids_by_query=[["1"], ["2", "3"]], candidate_set="nearest")
    assert [wanted.candidate_ids for wanted in request.wanted] == [(1,), (2, 3)]
    assert {wanted.candidate_set for wanted in request.wanted} == {"nearest"}


def test_unnamed_lists_share_a_name_only_if_they_hold_the_same_items() -> None:
    request = parse(query_ids=[QUERY, OTHER], candidate_ids_by_query=[[1, 2, 3], [3, 1, 2]])
    names = [wanted.candidate_set for wanted in (*request.wanted, *parse(query_id=QUERY, candidate_ids=[1]).wanted)]
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize(
    "payload",
    [
        {},
        {"query_id": "not-a-uuid"},
        {"query_id": QUERY, "candidate_ids": ["x"]},
        {"query_id": QUERY, "draws": "many"},
        {"query_id": QUERY, "candidate_set": "nearest-400"},
        {"query_id": QUERY, "candidate_ids": "12"},
        {"query_ids": []},
        {"query_ids": QUERY},
        {"query_ids": [QUERY, QUERY]},
        {"query_ids": [QUERY], "candidate_ids_by_query": [[1], [2]]},
        {"query_ids": [QUERY], "candidate_ids_by_query": [[1]], "candidate_ids": [1]},
    ],
)
def test_a_request_that_makes_no_sense_is_refused_for_good(payload: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        RankRequest.of(payload, teacher="abu_plus_linear", draws=64)
