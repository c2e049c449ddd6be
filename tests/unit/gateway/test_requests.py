"""What a client may ask, at its bounds."""

from __future__ import annotations

import struct
import uuid
from typing import Any

import pytest

from attribution.v1 import attribution_job_pb2 as wire
from byline.errors import InvalidRequest, PromptTooLong
from byline.jobs.states import Tier, Verification
from services.gateway.requests import Asked, Limits, new_job

LIMITS = Limits(
    default_model_id="m", default_top_k=20, max_top_k=1000, default_candidates=40, max_prompt_characters=2000,
    max_image_bytes=8 << 20, max_image_pixels=25_000_000, default_ttl_s=86400.0, max_attempts=3,
)  # fmt: skip
PNG = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", 8, 8) + b"\x08\x02\0\0\0"


def ask(query: Any = None, request_id: str = "", model: str = "", **options: Any) -> Asked:
    query = query or wire.Query(inline_image=PNG, prompt="a cat")
    return new_job("p", model, query, wire.JobOptions(**options), request_id, LIMITS)


def test_defaults_are_filled_in() -> None:
    asked = ask()
    job = asked.job
    assert (job.tier, job.top_k, job.candidates, job.ttl_s) == (Tier.RETRIEVED, 20, 40, 86400.0)
    assert job.verification is Verification.REQUIRED and job.model_id == "m"
    assert asked.inline_image == PNG and job.image_sha256 is None and uuid.UUID(job.request_id)


@pytest.mark.parametrize(
    ("top_k", "candidates", "expected"), [(0, 0, 40), (100, 0, 100), (10, 10, 10), (10, 1000, 1000)]
)
def test_candidates_are_at_least_top_k(top_k: int, candidates: int, expected: int) -> None:
    assert ask(tier="TIER_VERIFIED", top_k=top_k, candidates=candidates).job.candidates == expected


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"top_k": -1}, "options.top_k"),
        ({"top_k": 1001}, "options.top_k"),
        ({"tier": "TIER_VERIFIED", "top_k": 20, "candidates": 19}, "options.candidates"),
        ({"tier": "TIER_VERIFIED", "candidates": 1001}, "options.candidates"),
        ({"candidates": 40}, "options.candidates"),
        ({"tier": 77}, "options.tier"),
        ({"verification": 77}, "options.verification"),
    ],
)
def test_counts_and_enums_out_of_bounds_name_their_field(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask(**options)
    assert caught.value.field == field


def test_the_estimated_tier_searches_the_whole_corpus_and_takes_no_candidates() -> None:
    assert ask(tier="TIER_ESTIMATED").job.tier is Tier.ESTIMATED
    with pytest.raises(InvalidRequest, match="options.candidates"):
        ask(tier="TIER_ESTIMATED", candidates=50)


@pytest.mark.parametrize("seconds", [0, -5, 7 * 24 * 3600 + 1])
def test_a_time_to_live_out_of_bounds_is_refused(seconds: int) -> None:
    options = wire.JobOptions()
    options.ttl.seconds = seconds
    with pytest.raises(InvalidRequest, match="options.ttl"):
        ask(ttl=options.ttl)


def test_a_prompt_is_counted_in_characters() -> None:
    assert ask(wire.Query(inline_image=PNG, prompt="é" * 2000)).job.prompt == "é" * 2000
    with pytest.raises(PromptTooLong):
        ask(wire.Query(inline_image=PNG, prompt="é" * 2001))


def test_a_query_needs_exactly_one_source() -> None:
    with pytest.raises(InvalidRequest, match="needs one of"):
        ask(wire.Query(prompt="a cat"))


def test_only_the_own_projects_images_may_be_named() -> None:
    digest = "0" * 64
    assert ask(wire.Query(image=f"projects/p/images/{digest}")).job.image_sha256 == digest
    with pytest.raises(InvalidRequest, match="projects/p"):
        ask(wire.Query(image=f"projects/q/images/{digest}"))


@pytest.mark.parametrize("tier", ["TIER_ESTIMATED", "TIER_VERIFIED"])
def test_an_embedding_can_be_retrieved_and_nothing_else(tier: str) -> None:
    query = wire.Query(embedding=wire.Embedding(values=[0.6, 0.8], release="models/m/releases/r1"))
    asked = ask(query)
    assert asked.job.payload == {"embedding_release_id": "r1"} and asked.embedding_release_id == "r1"
    with pytest.raises(InvalidRequest, match="only RETRIEVED"):
        ask(query, tier=tier)
    other = wire.Query(embedding=wire.Embedding(values=[1.0], release="models/x/releases/r1"))
    with pytest.raises(InvalidRequest, match="models/m"):
        ask(other)


@pytest.mark.parametrize("model", ["m", "models/", "models/a b", "models/../x", "models/a/releases/b"])
def test_a_malformed_name_is_refused(model: str) -> None:
    with pytest.raises(InvalidRequest, match=r"models/\{model\}"):
        ask(model=model)
