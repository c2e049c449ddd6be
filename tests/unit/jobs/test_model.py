"""Fingerprints: the same id must mean the same request."""

from __future__ import annotations

import dataclasses

import pytest

from byline.jobs import Kind, NewJob, Tier, Verification, fingerprint
from byline.jobs.model import pack_embedding, unpack_embedding

BASE = NewJob(project_id="p", request_id="r", model_id="m", prompt="a cat", image_sha256="0" * 64)


def test_the_fingerprint_does_not_depend_on_the_request_id():
    assert fingerprint(dataclasses.replace(BASE, request_id="other")) == fingerprint(BASE)


@pytest.mark.parametrize(
    "change",
    [
        {"project_id": "q"},
        {"model_id": "n"},
        {"prompt": "a dog"},
        {"kind": Kind.RANKING},
        {"image_sha256": "1" * 64},
        {"image_sha256": None, "embedding": (1.0, 0.0)},
        {"tier": Tier.VERIFIED},
        {"verification": Verification.BEST_EFFORT},
        {"top_k": 21},
        {"candidates": 41},
        {"ttl_s": 60.0},
        {"payload": {"a": 1}},
        {"max_attempts": 4},
    ],
)
def test_the_fingerprint_depends_on_everything_that_is_asked_for(change: dict[str, object]):
    assert fingerprint(dataclasses.replace(BASE, **change)) != fingerprint(BASE)


def test_who_asks_and_under_which_trace_does_not_make_another_request():
    """A client that repeats a Create after a lost answer sends another traceparent, perhaps with a rotated key."""
    repeated = dataclasses.replace(BASE, traceparent=f"00-{'1' * 32}-{'2' * 16}-01", principal="key:other")
    assert fingerprint(repeated) == fingerprint(BASE)


def test_every_field_of_a_request_is_in_the_tests_above():
    assert {field.name for field in dataclasses.fields(NewJob)} == {
        "project_id", "request_id", "model_id", "prompt", "kind", "image_sha256", "embedding", "tier",
        "verification", "top_k", "candidates", "ttl_s", "payload", "max_attempts", "traceparent", "principal",
    }  # fmt: skip


def test_the_order_of_payload_keys_does_not_matter():
    one = dataclasses.replace(BASE, payload={"a": 1, "b": 2})
    other = dataclasses.replace(BASE, payload={"b": 2, "a": 1})
    assert fingerprint(one) == fingerprint(other)


def test_an_embedding_survives_packing_as_float32():
    assert unpack_embedding(pack_embedding((0.5, -1.0, 3.25))) == (0.5, -1.0, 3.25)
