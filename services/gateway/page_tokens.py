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
NamedPosition = tuple[datetime, str]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
#: Kind of row and moment; the row and the digest of the listing follow.
_HEAD = struct.Struct(">Bq")
_BY_UUID, _BY_NAME = 1, 2
_DIGEST_BYTES = 16
_SIGNATURE_BYTES = 16


class PageTokens:
    """Signs and checks page tokens. Every gateway of a deployment must have the same ``key``."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def encode(self, position: Position | NamedPosition, listing: Mapping[str, object]) -> str:
        """The token that continues after ``position`` (time and id of the last row sent)."""
        moment, row = position
        micros = (moment - _EPOCH) // timedelta(microseconds=1)
        kind, last = (_BY_UUID, row.bytes) if isinstance(row, uuid.UUID) else (_BY_NAME, row.encode())
        body = _HEAD.pack(kind, micros) + last + _listing_digest(listing)
        return base64.urlsafe_b64encode(body + self._sign(body)).rstrip(b"=").decode()

    def decode(self, token: str, listing: Mapping[str, object]) -> Position | None:
        """The position of a token, None for the empty one. PageTokenInvalid if it is not ours or not this listing's."""
        found = self._opened(token, listing, _BY_UUID) if token else None
        return None if found is None else (found[0], uuid.UUID(bytes=found[1]))

    def decode_named(self, token: str, listing: Mapping[str, object]) -> NamedPosition | None:
        """As ``decode``, of a listing whose rows have names for ids."""
        found = self._opened(token, listing, _BY_NAME) if token else None
        return None if found is None else (found[0], found[1].decode())

    def _opened(self, token: str, listing: Mapping[str, object], expected: int) -> tuple[datetime, bytes]:
        try:
            raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError) as error:
            raise _invalid() from error
        body, signature = raw[:-_SIGNATURE_BYTES], raw[-_SIGNATURE_BYTES:]
        if len(body) < _HEAD.size + _DIGEST_BYTES or not hmac.compare_digest(signature, self._sign(body)):
            raise _invalid()
        kind, micros = _HEAD.unpack_from(body)
        if kind != expected or body[-_DIGEST_BYTES:] != _listing_digest(listing):
            raise PageTokenInvalid("page_token", "belongs to another listing: keep all other fields as they were")
        return _EPOCH + timedelta(microseconds=micros), body[_HEAD.size : -_DIGEST_BYTES]

    def _sign(self, body: bytes) -> bytes:
        return hmac.digest(self._key, body, "sha256")[:_SIGNATURE_BYTES]


def derive_key(configured: str, database_url: str) -> bytes:
    """The signing key: the configured secret, else one derived from the database's address and password.

    Gateways of one deployment share the database, so they agree without any setting.
    """
    return hashlib.sha256(b"byline page tokens\0" + (configured or database_url).encode()).digest()


def _listing_digest(listing: Mapping[str, object]) -> bytes:
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).digest()[:_DIGEST_BYTES]


def _invalid() -> PageTokenInvalid:
    return PageTokenInvalid("page_token", "is not a token of this server; start again with an empty one")
