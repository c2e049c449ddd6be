"""Token buckets, keys and signatures: the parts without a database."""

from __future__ import annotations

from pathlib import Path

import pytest

from byline.config import load_settings
from byline.errors import SettingsInvalid
from byline.security.errors import SignatureInvalid, Unauthenticated
from byline.security.keys import digest, make_token, split_token
from byline.security.limits import BURST_S, RateLimits
from byline.security.signing import SIGNATURE, Keyring, check_manifest, sign_manifest


def test_a_key_that_keeps_to_its_rate_is_never_refused_and_one_that_does_not_gets_exactly_its_rate() -> None:
    limits = RateLimits()
    assert all(limits.admit({"k": 10.0}, 1.0, now / 10) is None for now in range(200))
    admitted = sum(limits.admit({"k2": 10.0}, 1.0, now / 1000) is None for now in range(20_000))
    assert 200 <= admitted <= 200 + 10 * BURST_S + 1


def test_after_the_wait_a_refusal_names_the_next_call_is_let_through() -> None:
    limits = RateLimits()
    now = 0.0
    while (refusal := limits.admit({"k": 2.0}, 1.0, now)) is None:
        pass
    assert limits.admit({"k": 2.0}, 1.0, now + refusal[1] * 0.9) is not None
    assert limits.admit({"k": 2.0}, 1.0, now + refusal[1] + 1e-9) is None


def test_a_project_without_tokens_takes_none_from_the_key() -> None:
    limits = RateLimits()
    while limits.admit({"project:p": 1.0}, 1.0, 0.0) is None:
        pass
    for _ in range(100):
        assert limits.admit({"key:a": 1.0, "project:p": 1.0}, 1.0, 0.0) == ("project:p", pytest.approx(1.0))
    assert limits.admit({"key:a": 1.0}, 1.0, 0.0) is None


def test_a_call_that_costs_more_than_a_burst_passes_once_and_is_paid_for_after() -> None:
    limits = RateLimits()
    assert limits.admit({"k": 1.0}, 100.0, 0.0) is None
    assert limits.admit({"k": 1.0}, 1.0, 90.0) is not None
    assert limits.admit({"k": 1.0}, 1.0, 97.0) is None


def test_a_rate_of_zero_is_no_limit() -> None:
    limits = RateLimits()
    assert all(limits.admit({"k": 0.0}, 1e9, 0.0) is None for _ in range(10))


def test_a_token_leads_to_its_id_and_digest_and_nothing_else_is_a_token() -> None:
    key_id, token, secret_sha256 = make_token()
    assert split_token(token) == (key_id, secret_sha256)
    assert make_token()[1] != token and digest(token) != secret_sha256
    for bad in ("", token[:-1], token + "x", token.replace("byl_", "k_"), token.upper(), f" {token}", "é" * 64):
        with pytest.raises(Unauthenticated):
            split_token(bad)


OLD, NEW = "o" * 40, "n" * 40


def test_a_rotated_key_signs_and_the_old_one_is_still_accepted_until_it_is_taken_out() -> None:
    old, both, new = Keyring.parse(OLD), Keyring.parse(f"{NEW}, {OLD}"), Keyring.parse(NEW)
    signature = old.sign("purpose", b"message")
    both.check("purpose", b"message", signature)
    assert both.sign("purpose", b"message") == new.sign("purpose", b"message")
    with pytest.raises(SignatureInvalid):
        new.check("purpose", b"message", signature)
    for purpose, message in (("other", b"message"), ("purpose", b"other")):
        with pytest.raises(SignatureInvalid):
            old.check(purpose, message, signature)
    for broken in ("", "hmac-sha256", signature[:-1], signature.replace("hmac", "none"), f"{signature[:-1]}0"[:-1]):
        with pytest.raises(SignatureInvalid):
            old.check("purpose", b"message", broken)


def test_keys_are_not_in_what_is_printed_of_a_keyring_or_of_the_settings() -> None:
    settings = load_settings(signing_key=OLD, api_key="byl_secret")
    assert OLD not in repr(settings) and "byl_secret" not in repr(settings)
    assert OLD not in repr(Keyring.parse(OLD)) and OLD[:10] not in str(Keyring.parse(OLD).key_ids)


def test_a_short_signing_key_is_refused() -> None:
    with pytest.raises(SettingsInvalid, match="SIGNING_KEY"):
        load_settings(signing_key=f"{OLD},short")


def test_a_manifest_without_a_good_signature_is_refused_where_a_key_is_set(tmp_path: Path) -> None:
    keyring = Keyring.parse(OLD)
    check_manifest(tmp_path, "digest", Keyring())
    with pytest.raises(SignatureInvalid, match="not signed"):
        check_manifest(tmp_path, "digest", keyring)
    sign_manifest(tmp_path, "digest", keyring)
    check_manifest(tmp_path, "digest", keyring)
    with pytest.raises(SignatureInvalid):
        check_manifest(tmp_path, "another digest", keyring)
    (tmp_path / SIGNATURE).write_bytes(b"\xff\xfe")
    with pytest.raises(SignatureInvalid):
        check_manifest(tmp_path, "digest", keyring)
