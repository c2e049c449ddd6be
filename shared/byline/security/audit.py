"""The audit: append-only events in a hash chain, and the command that checks it.

Why it exists: who asked what, which release answered, and who withdrew or activated what must be told truly years
later, also by somebody who could write to the database. The tables refuse UPDATE and DELETE (a trigger); whoever gets
round that breaks the chain, because each link covers its event and the link before. Links are MACs where a signing key
is set, so that the chain cannot be made anew from the database alone.

Events are written unlinked, in the transaction of what they tell of, and linked by ``seal`` a moment later: a chain in
the same transaction would let one job at a time be created. What is altered in that moment is not noticed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, RowMapping, insert, text

from byline.db.models import Base
from byline.db.session import transaction
from byline.errors import BylineError
from byline.security.errors import AuditBroken, SignatureInvalid
from byline.security.signing import Keyring

ALLOWED = "ALLOWED"
DENIED = "DENIED"

_events = Base.metadata.tables["audit_events"]
_chain = Base.metadata.tables["audit_chain"]
_PURPOSE = "audit-chain"
_START = hashlib.sha256(b"byline audit chain").digest()
_LOCK = 0x617564697463  # "auditc" in ASCII: one sealer at a time
_COLUMNS = "e.id, e.at, e.principal, e.project_id, e.action, e.resource, e.request_id, e.decision, e.detail"

# Ids are given before commits, so a small id may appear late: what is unlinked is looked for ten minutes back, and
# everywhere by ``verify`` and a thorough seal.
_UNSEALED = text(f"""
SELECT {_COLUMNS} FROM audit_events e
WHERE e.id > CASE WHEN :thorough THEN 0
        ELSE coalesce((SELECT max(event_id) FROM audit_chain WHERE at < now() - interval '10 minutes'), 0) END
    AND NOT EXISTS (SELECT 1 FROM audit_chain c WHERE c.event_id = e.id)
ORDER BY e.id LIMIT :most
""")  # noqa: S608
_HEAD = text("SELECT seq, hash FROM audit_chain ORDER BY seq DESC LIMIT 1")
_LINKS = text(f"""
SELECT c.seq, c.event_id, c.key_id, c.hash, {_COLUMNS} FROM audit_chain c LEFT JOIN audit_events e ON e.id = c.event_id
WHERE c.seq > :after ORDER BY c.seq LIMIT :most
""")  # noqa: S608
_LOOSE = text(
    "SELECT count(*), count(*) FILTER (WHERE at < now() - interval '10 minutes') FROM audit_events e"
    " WHERE NOT EXISTS (SELECT 1 FROM audit_chain c WHERE c.event_id = e.id)"
)


@dataclass(frozen=True)
class Head:
    """The end of the chain: kept elsewhere, it proves later that nothing before it was cut off."""

    seq: int
    hash: bytes

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash.hex()}"

    @classmethod
    def parse(cls, value: str) -> Head:
        """The inverse of ``str``. ValueError."""
        seq, _, hexadecimal = value.partition(":")
        return cls(int(seq), bytes.fromhex(hexadecimal))


@dataclass(frozen=True)
class Verified:
    """A chain that holds: its end, how many links a key signed, events not linked yet (and for over 10 minutes)."""

    head: Head
    signed: int
    unsealed: int
    overdue: int


def event(
    principal: str, action: str, resource: str, decision: str, *, project_id: str | None = None,
    request_id: str | None = None, detail: Mapping[str, Any] | None = None,
) -> Any:  # fmt: skip
    """The statement that records an event, for the transaction of what it tells of."""
    return insert(_events).values(
        principal=principal, project_id=_storable(project_id), action=action, resource=_storable(resource),
        request_id=_storable(request_id), decision=decision, detail=_storable(dict(detail or {})),
    )  # fmt: skip


def _storable(value: Any) -> Any:
    """As Postgres can keep it: a refusal must be recorded whatever the request held (no NUL, no NaN)."""
    if isinstance(value, str):
        return value.replace("\0", "\ufffd")
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {_storable(key): _storable(one) for key, one in value.items()}
    return value


class AuditLog:
    """Records, seals and verifies. All methods may raise DatabaseUnavailable."""

    def __init__(self, engine: Engine, keyring: Keyring) -> None:
        self._engine = engine
        self._keyring = keyring

    def record(self, statement: Any) -> None:
        """Commit one ``event`` by itself, for what has no transaction of its own."""
        with transaction(self._engine) as connection:
            connection.execute(statement)

    def seal(self, most: int = 1_000, *, thorough: bool = False) -> int:
        """Link events that are not linked yet; how many were. 0 also when another process is at it."""
        with transaction(self._engine) as connection:
            free = connection.execute(text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": _LOCK}).scalar_one()
            if not free:
                return 0
            rows = connection.execute(_UNSEALED, {"thorough": thorough, "most": most}).mappings().all()
            if not rows:
                return 0
            head = _head(connection)
            links = []
            for row in rows:
                key_id, digest = self._link(head.hash, row, None)
                head = Head(head.seq + 1, digest)
                links.append({"seq": head.seq, "event_id": row["id"], "key_id": key_id, "hash": digest})
            connection.execute(insert(_chain), links)
            return len(links)

    def head(self) -> Head:
        """The end of the chain as it stands."""
        with transaction(self._engine) as connection:
            return _head(connection)

    def verify(self, known: Head | None = None) -> Verified:
        """Follow the whole chain. AuditBroken at the first link that does not hold, or if it misses ``known``."""
        head, signed, met = Head(0, _START), 0, known is None or known.seq == 0
        with transaction(self._engine) as connection:
            for row in _pages(connection):
                _expect(row["seq"] == head.seq + 1, row, "a link was removed before it")
                _expect(row["id"] is not None, row, "its event was removed")
                _expect(bool(row["key_id"]) or not signed, row, "it is not signed though earlier ones are")
                try:
                    _, digest = self._link(head.hash, row, row["key_id"])
                except SignatureInvalid as error:
                    seq = row["seq"]
                    raise AuditBroken(f"link {seq} cannot be checked: {error.message}", seq=seq) from error
                _expect(digest == bytes(row["hash"]), row, "its event or the link was altered")
                head, signed = Head(row["seq"], digest), signed + bool(row["key_id"])
                if known is not None and known.seq == head.seq:
                    _expect(known.hash == head.hash, row, "it is not the link that was noted: the chain was made anew")
                    met = True
            if not met:
                raise AuditBroken(f"the chain ends at {head.seq}, before the noted link {known}", seq=head.seq)
            unsealed, overdue = connection.execute(_LOOSE).one()
        return Verified(head, signed, unsealed, overdue)

    def _link(self, before: bytes, row: RowMapping, key_id: str | None) -> tuple[str, bytes]:
        """Key id and hash of the link of an event; ``key_id`` names the key of an old link, empty for none."""
        message = before + canonical(row)
        if key_id == "" or (key_id is None and not self._keyring):
            return "", hashlib.sha256(message).digest()
        return self._keyring.mac(_PURPOSE, message, key_id)


def canonical(row: Mapping[Any, Any]) -> bytes:
    """An event as the bytes that its link covers."""
    value = {
        "id": row["id"], "at": row["at"].isoformat(), "principal": row["principal"], "project": row["project_id"],
        "action": row["action"], "resource": row["resource"], "request_id": row["request_id"],
        "decision": row["decision"], "detail": row["detail"],
    }  # fmt: skip
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _head(connection: Connection) -> Head:
    row = connection.execute(_HEAD).one_or_none()
    return Head(0, _START) if row is None else Head(row.seq, bytes(row.hash))


def _pages(connection: Connection, most: int = 5_000) -> Iterator[RowMapping]:
    after = 0
    while True:
        rows = connection.execute(_LINKS, {"after": after, "most": most}).mappings().all()
        yield from rows
        if len(rows) < most:
            return
        after = rows[-1]["seq"]


def _expect(holds: bool, row: RowMapping, what: str) -> None:
    if not holds:
        broken: BylineError = AuditBroken(
            f"the audit is broken at link {row['seq']} (event {row['event_id']}): {what}", seq=row["seq"],
            event=row["event_id"],
        )  # fmt: skip
        raise broken
