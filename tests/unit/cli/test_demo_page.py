"""The demo's page says what was measured, safely, and the demo's split of labels leaks nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from byline.cli.demo import FIRST_SHARE, portions
from byline.cli.demo_page import ShownQuery, render
from byline.cli.demo_strangers import strangers
from byline.client.values import Answer, Influence, Probability
from byline.rankings.snapshot import SnapshotQuery


def influence(item_id: int, rank: int, **more: Any) -> Influence:
    values: dict[str, Any] = {
        "item_id": item_id, "rank": rank, "cosine": 0.9 - rank / 100, "tau": None, "standard_error": None,
        "probability": None, "retrieved_rank": rank, "caption": f"thing {item_id}", "creator": "Ann <b>Artist</b>",
        "licence": "public domain", "near_duplicate_group": item_id, "image_sha256": "0" * 64,
        "name": f"corpora/c/items/{item_id}",
    }  # fmt: skip
    return Influence(**(values | more))


def answer(*influences: Influence, tier: str = "RETRIEVED") -> Answer:
    return Answer(
        tier=tier, release="r1", model_revision="m", not_attributable=None, noise_floor=None, influences=influences,
        withdrawn_influences=0, teacher_id="", draws=64, credit=None, timings_ms={}, create_time=None,
    )  # fmt: skip


RESULT: dict[str, Any] = {
    "latency_ms": {"retrieved": 110.0, "verified": 16_000.0}, "speedup": 145.4, "speedup_over_whole_corpus": 9_000.0,
    "verify": {"candidates": 40, "draws": 64}, "corpus": {"items": 2509, "creators": 358},
    "map": {"L": 100, "head": 0.5, "raw": {"minilm": 0.3}, "queries": 50, "ceiling": 0.7},
    "releases": [{"name": "r1", "labels": 90, "map": 0.4}, {"name": "r2", "labels": 200, "map": 0.5}],
    "jobs": {"submitted": 10, "succeeded": 10, "failed": 0},
    "swap": {"lookups": 100, "failed": 0, "mixed": 0}, "command": "make demo", "seconds": 300.0,
    "machine": {"cpu": "some", "cores": 2}, "commit": "abc",
}  # fmt: skip


def shown() -> ShownQuery:
    slow = answer(
        influence(2, 1, tau=0.0123, standard_error=0.001, retrieved_rank=2),
        influence(1, 2, tau=0.0045, standard_error=0.001, retrieved_rank=1),
        tier="VERIFIED",
    )
    return ShownQuery(
        prompt="a <script>cat</script>", image=b"png", latency_ms=110,
        retrieved=answer(influence(1, 1), influence(2, 2)), verified=slow, verified_seconds=16.0,
        thumbnails={1: b"one", 2: b"two"},
    )  # fmt: skip


def test_text_of_prompts_captions_and_creators_is_escaped() -> None:
    page = render(RESULT, [shown()])
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "Ann &lt;b&gt;Artist" in page


def test_fast_and_verified_orders_stand_side_by_side_with_their_figures() -> None:
    page = render(RESULT, [shown()])
    assert "12.30 ± 1.00" in page and "4.50 ± 1.00" in page
    assert "▲ from 2" in page and "▼ from 1" in page
    assert page.index("RETRIEVED") < page.index("VERIFIED")


def test_probabilities_stand_under_their_scores_and_what_is_refused_says_so() -> None:
    sure = influence(1, 1, probability=Probability(0.625, 0.5, 0.75, 0.9, 100))
    known = replace(shown(), retrieved=answer(sure), verified=None)
    page = render(RESULT, [known])
    assert "P(top 100) 0.62 (0.50–0.75)" in page and "NOT ATTRIBUTABLE" not in page and "not this model" not in page
    refused = replace(answer(sure), not_attributable=True, evidence=-0.1, evidence_floor=0.2)
    page = render(RESULT, [known], [replace(known, retrieved=refused)])
    assert "NOT ATTRIBUTABLE</b>: the model seems not to have made this image" in page
    assert "1 of them are answered as not attributable" in page


def test_strangers_are_a_photograph_and_a_picture_under_another_prompt() -> None:
    [(photograph, first), (picture, other)] = strangers([(b"one", "a cat"), (b"two", "a dog")])
    assert photograph.startswith(b"\x89PNG") and (first, picture, other) == ("a cat", b"one", "a dog")
    assert len(strangers([(b"one", "a cat")])) == 1


def test_an_unverified_query_shows_no_verified_row() -> None:
    assert "VERIFIED</b>" not in render(RESULT, [replace(shown(), verified=None, verified_seconds=None)])


def test_an_estimate_stands_between_them_and_marks_what_only_it_found() -> None:
    estimate = answer(
        influence(3, 1, tau=0.02, standard_error=0.001, retrieved_rank=None),
        influence(1, 2, tau=0.01, retrieved_rank=1),
        tier="ESTIMATED",
    )  # fmt: skip
    query = replace(shown(), estimated=estimate, estimated_seconds=1.25, thumbnails={1: b"1", 2: b"2", 3: b"3"})
    page = render({**RESULT, "latency_ms": {**RESULT["latency_ms"], "estimated": 1250.0}}, [query])
    assert "<b>1.2 s</b>" in page and ">new</span>" in page
    assert page.index("RETRIEVED</b>") < page.index("ESTIMATED</b>") < page.index("VERIFIED</b>")
    assert "ESTIMATED" not in render(RESULT, [shown()])


def test_the_best_head_is_the_one_marked_and_the_swap_is_told() -> None:
    page = render(RESULT, [shown()])
    assert '<tr class="best"><td>head of release r2</td><td class="n">0.500</td></tr>' in page
    assert "100 lookups ran meanwhile: 0 failed, 0 mixed" in page


def test_release_one_never_sees_the_later_labels_and_always_the_held_out_ones() -> None:
    def query(number: int, split: str) -> SnapshotQuery:
        one = np.ones(1, np.float32)
        return SnapshotQuery(
            prompt=f"p{number}", seed=number, split=split, near_duplicate_group=number, source="corpus",
            candidate_set="corpus", draws=8, image=b"", item_ids=np.ones(1, np.int64), tau=one, standard_error=one,
            tau_halves=None,
        )  # fmt: skip

    queries = [query(n, ("train", "train", "validation", "test", "train")[n % 5]) for n in range(50)]
    first, later = portions(queries)
    assert {q.prompt for q in first} | {q.prompt for q in later} == {q.prompt for q in queries}
    assert not {q.prompt for q in first} & {q.prompt for q in later}
    assert {q.split for q in later} == {"train"}
    assert sum(q.split == "train" for q in first) == round(FIRST_SHARE * 30)
