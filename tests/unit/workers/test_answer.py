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


def item(item_id: int) -> Item:
    return Item(item_id, f"caption {item_id}", creator="Ann", licence="public domain", image_sha256=f"{item_id:064x}")


def answer(ids: list[int], top_k: int) -> Answer:
    influences = [
        retrieved_influence(item(one), rank=rank, cosine=1.0 - rank / 10, probability=None)
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
