"""Opaque page tokens: where a keyset listing goes on, bound to the listing it belongs to.

Why it exists: base64 alone invites clients to write their own tokens, and a token of one listing must not
silently continue another. A token is signed, carries no authorisation, and is refused when anything but the
page size changed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import struct
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from byline.errors import PageTokenInvalid

Position = tuple[datetime, uuid.UUID]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_BODY = struct.Struct(">Bq16s16s")
_VERSION = 1
_SIGNATURE_BYTES = 16


class PageTokens:
    """Signs and checks page tokens. Every gateway of a deployment must have the same ``key``."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def encode(self, position: Position, listing: Mapping[str, object]) -> str:
        """The token that continues after ``position`` (create time and id of the last row sent)."""
        moment, row = position
        micros = (moment - _EPOCH) // timedelta(microseconds=1)
        body = _BODY.pack(_VERSION, micros, row.bytes, _listing_digest(listing))
        return base64.urlsafe_b64encode(body + self._sign(body)).rstrip(b"=").decode()

    def decode(self, token: str, listing: Mapping[str, object]) -> Position | None:
        """The position of a token, None for the empty one. PageTokenInvalid if it is not ours or not this listing's."""
        if not token:
            return None
        try:
            raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError) as error:
            raise _invalid() from error
        body, signature = raw[: _BODY.size], raw[_BODY.size :]
        if len(body) != _BODY.size or not hmac.compare_digest(signature, self._sign(body)):
            raise _invalid()
        version, micros, row, digest = _BODY.unpack(body)
        if version != _VERSION:
            raise _invalid()
        if digest != _listing_digest(listing):
            raise PageTokenInvalid("page_token", "belongs to another listing: keep all other fields as they were")
        return _EPOCH + timedelta(microseconds=micros), uuid.UUID(bytes=row)

    def _sign(self, body: bytes) -> bytes:
        return hmac.digest(self._key, body, "sha256")[:_SIGNATURE_BYTES]


def derive_key(configured: str, database_url: str) -> bytes:
    """The signing key: the configured secret, else one derived from the database's address and password.

    Gateways of one deployment share the database, so they agree without any setting.
    """
    return hashlib.sha256(b"byline page tokens\0" + (configured or database_url).encode()).digest()


def _listing_digest(listing: Mapping[str, object]) -> bytes:
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).digest()[:16]


def _invalid() -> PageTokenInvalid:
    return PageTokenInvalid("page_token", "is not a token of this server; start again with an empty one")
