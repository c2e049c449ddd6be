"""API keys: made once, shown once, kept as a digest, revoked at once.

Why it exists: a stolen database must not be a set of working keys, and a leaked key must stop working while the person
who noticed still looks at the screen. A key reads ``byl_<id>_<secret>``; the secret has 256 bits, so a plain sha256 of
it cannot be turned back and needs no salt.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Engine, func, insert, select, text
from sqlalchemy.dialects.postgresql import insert as pg_insert

from byline.db.listen import KEYS
from byline.db.models import Base
from byline.db.session import single_statements, transaction
from byline.errors import InvalidRequest
from byline.security.errors import KeyNotFound, Unauthenticated
from byline.security.scopes import PROJECT_SCOPES, Principal, Scope

_keys = Base.metadata.tables["api_keys"]
_projects = Base.metadata.tables["projects"]
_audit = Base.metadata.tables["audit_events"]
_TOKEN = re.compile(r"byl_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
_PROJECT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

_FIND = text("""
SELECT k.id, k.project_id, k.secret_sha256, k.scopes, k.rate_per_second, p.rate_per_second AS project_rate,
    k.last_used_at IS NULL OR k.last_used_at < now() - interval '1 minute' AS stale
FROM api_keys k LEFT JOIN projects p ON p.id = k.project_id
WHERE k.id = ANY(:ids) AND k.revoked_at IS NULL AND (k.expires_at IS NULL OR k.expires_at > now())
    AND p.disabled_at IS NULL
""")
_TOUCH = text("UPDATE api_keys SET last_used_at = now() WHERE id = ANY(:ids)")


@dataclass(frozen=True)
class KeyRecord:
    """What is known of a key: everything but its secret."""

    id: str
    project_id: str | None
    name: str
    scopes: tuple[str, ...]
    rate_per_second: float | None
    created_at: datetime
    created_by: str
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None


@dataclass(frozen=True)
class IssuedKey:
    """A new key; ``token`` is never seen again."""

    record: KeyRecord
    token: str


def make_token(random_bytes: Callable[[int], bytes] = secrets.token_bytes) -> tuple[str, str, bytes]:
    """Id, token and the secret's digest of a new key."""
    key_id = random_bytes(8).hex()
    secret = base64.urlsafe_b64encode(random_bytes(32)).rstrip(b"=").decode()
    return key_id, f"byl_{key_id}_{secret}", digest(secret)


def digest(secret: str) -> bytes:
    """What is stored of a secret."""
    return hashlib.sha256(secret.encode()).digest()


def split_token(token: str) -> tuple[str, bytes]:
    """Id and digest of the secret. Unauthenticated if it is no key at all."""
    found = _TOKEN.fullmatch(token)
    if found is None:
        raise refused()
    return found[1], digest(found[2])


def refused() -> Unauthenticated:
    """The one answer to every key that opens nothing."""
    return Unauthenticated("this call needs a valid API key: send the metadata `authorization: Bearer byl_...`")


class KeyStore:
    """The ``api_keys`` and ``projects`` tables. Every change is announced, so gateways forget what they remember."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def create(
        self,
        *,
        project_id: str | None,
        name: str,
        scopes: Iterable[str],
        days: float | None = None,
        rate_per_second: float | None = None,
        principal: str = "local",
    ) -> IssuedKey:
        """A new key of a project (made if it is not known yet), or of an operator with ``project_id`` None.

        ``days`` from now it expires. InvalidRequest for an unknown scope, or one that reaches beyond a project.
        """
        wanted = sorted(_scopes(scopes, project_id))
        key_id, token, secret_sha256 = make_token()
        row = {
            "id": key_id, "project_id": project_id, "name": name, "secret_sha256": secret_sha256, "scopes": wanted,
            "rate_per_second": rate_per_second, "created_by": principal,
            "expires_at": None if days is None else func.now() + func.make_interval(0, 0, 0, 0, 0, 0, days * 86_400),
        }  # fmt: skip
        with transaction(self._engine) as connection:
            if project_id is not None:
                if not _PROJECT.fullmatch(project_id):
                    raise InvalidRequest("project", "may hold letters, digits and . _ - only", value=project_id[:80])
                connection.execute(pg_insert(_projects).values(id=project_id).on_conflict_do_nothing())
            made = connection.execute(insert(_keys).values(row).returning(_keys)).mappings().one()
            detail = {"scopes": wanted, "name": name}
            connection.execute(_audited("CreateApiKey", principal, project_id, key_id, detail))
            connection.execute(select(func.pg_notify(KEYS, key_id)))
        return IssuedKey(_record(made), token)

    def list(self, project_id: str | None = None) -> list[KeyRecord]:
        """All keys, or those of one project, newest first, the revoked ones too."""
        query = select(_keys).order_by(_keys.c.created_at.desc(), _keys.c.id)
        if project_id is not None:
            query = query.where(_keys.c.project_id == project_id)
        with transaction(self._engine) as connection:
            return [_record(row) for row in connection.execute(query).mappings()]

    def revoke(self, key_id: str, principal: str = "local") -> KeyRecord:
        """End a key for good; revoking it twice changes nothing. KeyNotFound."""
        with transaction(self._engine) as connection:
            locked = select(_keys).where(_keys.c.id == key_id).with_for_update()
            row = connection.execute(locked).mappings().one_or_none()
            if row is None:
                raise KeyNotFound(f"there is no API key {key_id}; `byline keys list` shows them", key=key_id)
            if row["revoked_at"] is None:
                ended = _keys.update().where(_keys.c.id == key_id).values(revoked_at=func.now()).returning(_keys)
                row = connection.execute(ended).mappings().one()
                connection.execute(_audited("RevokeApiKey", principal, row["project_id"], key_id, {}))
                connection.execute(select(func.pg_notify(KEYS, key_id)))
            return _record(row)

    def authenticate(self, token: str) -> Principal:
        """Who holds this key. Unauthenticated for everything that is not a living key of a living project."""
        split_token(token)
        found = self.authenticate_all([token])
        if token not in found:
            raise refused()
        return found[token]

    def authenticate_all(self, tokens: Sequence[str]) -> dict[str, Principal]:
        """Who holds these keys, asked in one query: without those that are no living key of a living project."""
        parts: dict[str, tuple[str, bytes]] = {}
        for token in tokens:
            with suppress(Unauthenticated):
                parts[token] = split_token(token)
        if not parts:
            return {}
        with single_statements(self._engine) as connection:
            asked = {"ids": sorted({key_id for key_id, _ in parts.values()})}
            rows = {row["id"]: row for row in connection.execute(_FIND, asked).mappings()}
            found = {
                token: _principal(rows[key_id]) for token, (key_id, secret_sha256) in parts.items()
                if key_id in rows and hmac.compare_digest(bytes(rows[key_id]["secret_sha256"]), secret_sha256)
            }  # fmt: skip
            stale = sorted({key_id for token in found if rows[key_id := parts[token][0]]["stale"]})
            if stale:
                connection.execute(_TOUCH, {"ids": stale})
        return found


def _principal(row: Mapping[Any, Any]) -> Principal:
    scopes = frozenset(Scope(scope) for scope in row["scopes"] if scope in set(Scope))
    return Principal(f"key:{row['id']}", row["project_id"], scopes, row["rate_per_second"], row["project_rate"])


def _scopes(asked: Iterable[str], project_id: str | None) -> frozenset[Scope]:
    known = set(Scope)
    asked = list(asked)
    for scope in asked:
        if scope not in known:
            raise InvalidRequest("scope", f"{scope} is unknown; choose among {', '.join(Scope)}", value=scope[:80])
        if project_id is not None and scope not in PROJECT_SCOPES:
            raise InvalidRequest(
                "scope", f"{scope} reaches beyond one project: make an operator's key for it (--operator)", value=scope
            )
    if not asked:
        raise InvalidRequest("scope", "a key needs at least one scope")
    return frozenset(map(Scope, asked))


def _audited(action: str, principal: str, project_id: str | None, key_id: str, detail: Mapping[str, Any]) -> Any:
    return insert(_audit).values(
        principal=principal, project_id=project_id, action=action, resource=f"apiKeys/{key_id}", decision="ALLOWED",
        detail=dict(detail),
    )  # fmt: skip


def _record(row: Mapping[Any, Any]) -> KeyRecord:
    return KeyRecord(
        id=row["id"], project_id=row["project_id"], name=row["name"], scopes=tuple(row["scopes"]),
        rate_per_second=row["rate_per_second"], created_at=row["created_at"], created_by=row["created_by"],
        expires_at=row["expires_at"], revoked_at=row["revoked_at"], last_used_at=row["last_used_at"],
    )  # fmt: skip
