"""The shape and the order of answers."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest

from byline.catalog.items import Item
from byline.evaluation.calibration import Probability
from services.workers.answer import (
    Answer,
    candidates_of,
    estimated_answer,
    item_ids_of,
    retrieved_answer,
    retrieved_influence,
    verified_answer,
)


@dataclass(frozen=True)
class Scores:
    item_ids: np.ndarray
    tau: np.ndarray
    standard_error: np.ndarray
    tau_halves: np.ndarray | None = None
    samples: np.ndarray | None = None
    teacher_id: str = "abu_plus/test"
    draws: int = 8
    candidate_set: str = "given"


def item(item_id: int, group: int = -1) -> Item:
    return Item(item_id, f"caption {item_id}", creator="Ann", licence="public domain", image_sha256=f"{item_id:064x}",
                near_duplicate_group=group)  # fmt: skip


def answer(ids: list[int], top_k: int, groups: dict[int, int] | None = None) -> Answer:
    """Items of ``ids``, best first; with ``groups`` (item to group) copies stand together."""
    influences = [
        retrieved_influence(item(one, (groups or {}).get(one, -1)), rank=rank, cosine=1.0 - rank / 10, probability=None)
        for rank, one in enumerate(ids, start=1)
    ]
    return retrieved_answer(
        influences,
        top_k=top_k,
        release_id="r1",
        model_revision="m1",
        not_attributable=False,
        noise_floor=None,
        timings_ms={"total": 1.23456},
        apart=groups is None,
    )


def scores(pairs: list[tuple[int, float]]) -> Scores:
    ids = np.array([pair[0] for pair in pairs], dtype=np.int64)
    tau = np.array([pair[1] for pair in pairs], dtype=np.float32)
    return Scores(ids, tau, np.full(len(pairs), 0.5, dtype=np.float32))


def test_an_item_id_beyond_53_bits_survives_json() -> None:
    big = 2**63 - 1
    read_back = json.loads(json.dumps(answer([big], 1)))
    assert item_ids_of(read_back) == [big]


def test_the_client_sees_top_k_and_the_teacher_sees_the_rest_too() -> None:
    found = answer([5, 4, 3, 2, 1], top_k=2)
    assert [one["item_id"] for one in found["influences"]] == ["5", "4"]
    assert [one["item_id"] for one in candidates_of(found, limit=4)] == ["5", "4", "3", "2"]


def test_an_excluded_item_is_no_candidate_and_makes_room_for_the_next() -> None:
    found = answer([5, 4, 3, 2, 1], top_k=2)
    assert [one["item_id"] for one in candidates_of(found, limit=3, excluded=[4])] == ["5", "3", "2"]


#: A picture (9) that was saved forty times, before everything else.
FLOOD = {one: 9 for one in (9, *range(100, 140))}


def test_a_picture_saved_forty_times_is_one_candidate_and_leaves_the_other_places_to_others() -> None:
    ids = [*FLOOD, 5, 4, 3]
    found = answer(ids, top_k=2, groups=FLOOD)
    assert [one["item_id"] for one in candidates_of(found, limit=3)] == ["9", "5", "4"]
    assert [one["item_id"] for one in candidates_of(found, limit=2, excluded=[9])] == ["100", "5"]
    apart = answer(ids, top_k=2)
    assert [one["item_id"] for one in candidates_of(apart, limit=3)] == ["9", "100", "101"]


def test_a_verified_answer_shows_top_k_groups_and_names_the_copies_it_did_not_score() -> None:
    found = answer([*FLOOD, 5, 4, 3], top_k=2, groups=FLOOD)
    candidates = candidates_of(found, limit=4, excluded=[101])
    verified = verified_answer(
        found, candidates, scores([(9, 1.0), (5, 3.0), (4, 0.5), (3, 2.0)]),
        top_k=3, model_revision="measured", timings_ms={}, excluded=[101],
    )  # fmt: skip
    shown = verified["influences"]
    assert [(one["item_id"], one["rank"]) for one in shown[:3]] == [("5", 1), ("3", 2), ("9", 3)]
    copies = shown[3:]
    assert [int(one["item_id"]) for one in copies] == [100, *range(102, 140)], "in the lookup's order, none withdrawn"
    assert {(one["rank"], one["tau"], one["standard_error"]) for one in copies} == {(3, None, None)}
    assert [(one["item_id"], one["rank"]) for one in verified["candidates"]] == [("4", 4)]


def test_a_verified_answer_is_ordered_by_tau_and_keeps_the_retrieved_rank() -> None:
    found = answer([5, 4, 3], top_k=3)
    verified = verified_answer(
        found, candidates_of(found, limit=3), scores([(5, -1.0), (4, 2.0), (3, 7.0)]),
        top_k=2, model_revision="measured", timings_ms={},
    )  # fmt: skip
    assert [(one["item_id"], one["rank"], one["retrieved_rank"]) for one in verified["influences"]] == [
        ("3", 1, 3),
        ("4", 2, 2),
    ]
    assert [one["item_id"] for one in verified["candidates"]] == ["5"]
    assert (verified["tier"], verified["model_revision"]) == ("VERIFIED", "measured")
    assert (verified["teacher_id"], verified["draws"]) == ("abu_plus/test", 8)


def test_a_verified_answer_names_the_release_of_the_retrieved_one() -> None:
    found = answer([5], top_k=1)
    verified = verified_answer(
        found, candidates_of(found, limit=1), scores([(5, 1.0)]), top_k=1, model_revision="measured", timings_ms={}
    )
    assert verified["release_id"] == found["release_id"]
    assert verified["influences"][0]["cosine"] == found["influences"][0]["cosine"]


def test_the_slower_tiers_keep_what_the_lookup_said_of_the_whole_answer_and_of_each_item() -> None:
    sure = retrieved_influence(item(5), rank=1, cosine=0.5, probability=Probability(0.6, 0.5, 0.7, 0.9, 100))
    found = retrieved_answer([sure], top_k=1, release_id="r1", model_revision="m1", not_attributable=True,
                             noise_floor=0.25, timings_ms={}, evidence=-0.5, evidence_floor=0.125)  # fmt: skip
    verified = verified_answer(found, candidates_of(found, limit=1), scores([(5, 1.0)]), top_k=1,
                               model_revision="measured", timings_ms={})  # fmt: skip
    estimated = estimated_answer(found, [(item(5), 0.5, 0.1)], release_id="r1", model_revision="measured",
                                 teacher_id="sketch/1", draws=64, timings_ms={})  # fmt: skip
    for slow in (verified, estimated):
        for name in ("not_attributable", "noise_floor", "evidence", "evidence_floor"):
            assert slow[name] == found[name]
        assert [slow["influences"][0][f"probability{part}"] for part in ("", "_low", "_high", "_coverage", "_top")] == [
            0.6, 0.5, 0.7, 0.9, 100]  # fmt: skip


def test_equal_tau_is_ordered_by_item_id_whatever_order_the_teacher_used() -> None:
    found = answer([5, 4, 3], top_k=3)
    candidates = candidates_of(found, limit=3)
    answers = [
        verified_answer(found, candidates, scores(pairs), top_k=3, model_revision="measured", timings_ms={})
        for pairs in ([(5, 1.0), (4, 1.0), (3, 1.0)], [(3, 1.0), (5, 1.0), (4, 1.0)])
    ]
    orders = [[one["item_id"] for one in verified["influences"]] for verified in answers]
    assert orders == [["3", "4", "5"]] * 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_answer_never_holds_a_number_json_cannot_say(bad: float) -> None:
    found = answer([5, 4], top_k=2)
    ranking = scores([(5, 1.0), (4, bad)])
    ranking.standard_error[0] = bad
    verified = verified_answer(
        found, candidates_of(found, limit=2), ranking, top_k=2, model_revision="measured", timings_ms={}
    )
    json.dumps(verified, allow_nan=False)
    assert [one["item_id"] for one in verified["influences"]] == ["5"]
    assert verified["influences"][0]["standard_error"] is None


def test_an_estimated_answer_names_items_the_lookup_did_not_and_says_so() -> None:
    found = answer([5, 4, 3], top_k=2)
    estimated = estimated_answer(
        found, [(item(9), 0.5, 0.1), (item(3), 0.25, float("nan"))], release_id="r1", model_revision="measured",
        teacher_id="sketch/1", draws=64, timings_ms={"search": 0.12345},
    )  # fmt: skip
    json.dumps(estimated, allow_nan=False)
    new, known = estimated["influences"]
    assert (new["rank"], new["item_id"], new["cosine"], new["retrieved_rank"]) == (1, "9", None, None)
    assert (known["rank"], known["item_id"], known["retrieved_rank"]) == (2, "3", 3)
    assert known["cosine"] == candidates_of(found, limit=3)[2]["cosine"]
    assert (new["tau"], new["standard_error"], known["standard_error"]) == (0.5, 0.1, None)
    assert (estimated["tier"], estimated["candidates"], estimated["timings_ms"]) == ("ESTIMATED", [], {"search": 0.123})
    assert item_ids_of(estimated) == [9, 3]
