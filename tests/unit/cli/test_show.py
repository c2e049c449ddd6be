"""``byline show``: people see a score, not a cosine, and are told what it is."""

from __future__ import annotations

import io
from dataclasses import fields
from typing import Any

from rich.console import Console

from byline.cli.page import page
from byline.cli.show import SCORE, table, to_json
from byline.client import Answer, Influence, Job, Probability


def example() -> tuple[Job, Answer]:
    influence = _fill(Influence, item_id=1, rank=1, cosine=1.25, caption="a cat", creator="ann", licence="cc0")
    answer = _fill(Answer, tier="RETRIEVED", release="models/m/releases/r1", influences=(influence,), timings_ms={})
    return _fill(Job, prompt="a cat", name="projects/p/attributionJobs/j", answers=(answer,)), answer


def _fill(kind: Any, **values: Any) -> Any:
    """A value whose other fields are absent (None, or zero and empty where the type says text, number or tuple)."""
    empty = {"str": "", "int": 0, "bool": False}
    rest = {f.name: empty.get(str(f.type), () if str(f.type).startswith("tuple") else None) for f in fields(kind)}
    return kind(**{**rest, **values})


def test_the_heads_inner_product_is_called_a_score_and_explained() -> None:
    job, answer = example()
    shown = io.StringIO()
    Console(file=shown, width=300).print(table(job, answer))
    for text in (" ".join(shown.getvalue().split()), page(job, None, {})):
        assert "1.250" in text
        assert "score" in text
        assert "inner product" in text and "may exceed 1" in text
        assert "cosine" not in text
    assert SCORE.startswith("score:")


def test_probabilities_say_what_of_and_a_refusal_says_why() -> None:
    sure = Probability(0.625, 0.5, 0.75, 0.9, 100)
    one = _fill(Influence, item_id=1, rank=1, cosine=1.25, caption="a cat", probability=sure)
    asked = {"tier": "RETRIEVED", "release": "r1", "influences": (one,), "timings_ms": {}, "noise_floor": 0.5}
    for refused, evidence, said in (
        (False, None, None), (True, 0.9, "nothing rises above the noise floor (0.5)"),
        (True, -0.1, "(evidence -0.100 of 0.200)"),
    ):  # fmt: skip
        answer = _fill(Answer, **asked, not_attributable=refused, evidence=evidence, evidence_floor=0.2)
        job = _fill(Job, prompt="a cat", name="j", answers=(answer,))
        shown = io.StringIO()
        Console(file=shown, width=400).print(table(job, answer))
        for text in (" ".join(shown.getvalue().split()), page(job, None, {})):
            assert "P(top 100)" in text and "0.62 (0.50–0.75)" in text and "interval that holds 90%" in text
            assert ("NOT ATTRIBUTABLE" in text) == (said is not None) and (said is None or said in text)


def test_json_keeps_the_field_name_of_the_api() -> None:
    assert '"cosine": 1.25' in to_json(example()[0])


def test_an_estimate_says_what_it_is_and_shows_items_the_lookup_did_not_name() -> None:
    job, _ = example()
    new = _fill(Influence, item_id=2, rank=1, tau=0.5, standard_error=0.01, caption="a dog")
    moved = _fill(Influence, item_id=1, rank=2, tau=0.25, retrieved_rank=1, cosine=0.5, caption="a cat")
    answer = _fill(
        Answer, tier="ESTIMATED", release="models/m/releases/r1", influences=(new, moved), timings_ms={},
        teacher_id="sketch/1", draws=64,
    )  # fmt: skip
    shown = io.StringIO()
    Console(file=shown, width=300).print(table(job, answer))
    text = " ".join(shown.getvalue().split())
    assert "whole corpus" in text and "64 draws" in text and "0.5 ± 0.01" in text
    html = page(_fill(Job, prompt="", name="j", answers=(answer,)), None, {})
    assert "<h2>Estimated</h2>" in html and "▲ new" in html and "▼1" in html
