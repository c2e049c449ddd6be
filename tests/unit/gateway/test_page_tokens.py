"""Page tokens: signed, bound to their listing, without a way around."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime

import pytest

from byline.errors import PageTokenInvalid
from services.gateway.page_tokens import PageTokens, derive_key

LISTING = {"project": "a", "states": ["QUEUED"]}
POSITION = (datetime(2026, 11, 23, 12, 0, 0, 123456, tzinfo=UTC), uuid.UUID(int=7))


@pytest.fixture
def tokens() -> PageTokens:
    return PageTokens(b"k" * 32)


def test_a_token_brings_back_its_position_to_the_microsecond(tokens: PageTokens) -> None:
    assert tokens.decode(tokens.encode(POSITION, LISTING), LISTING) == POSITION


def test_the_empty_token_is_the_first_page(tokens: PageTokens) -> None:
    assert tokens.decode("", LISTING) is None


@pytest.mark.parametrize("position", range(0, 76, 5))
def test_an_altered_token_is_refused(tokens: PageTokens, position: int) -> None:
    token = tokens.encode(POSITION, LISTING)
    other = "A" if token[position] != "A" else "B"
    with pytest.raises(PageTokenInvalid):
        tokens.decode(token[:position] + other + token[position + 1 :], LISTING)


@pytest.mark.parametrize("text", ["x", "!!!!", "é", "AAAA", "A" * 200])
def test_what_is_no_token_is_refused(tokens: PageTokens, text: str) -> None:
    with pytest.raises(PageTokenInvalid):
        tokens.decode(text, LISTING)


def test_a_token_of_another_listing_or_key_is_refused(tokens: PageTokens) -> None:
    token = tokens.encode(POSITION, LISTING)
    with pytest.raises(PageTokenInvalid, match="another listing"):
        tokens.decode(token, {**LISTING, "project": "b"})
    with pytest.raises(PageTokenInvalid):
        PageTokens(derive_key("", "postgresql://elsewhere")).decode(token, LISTING)
