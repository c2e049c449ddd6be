"""Who calls, whether they may, and how often: asked once, before a handler runs.

Why it exists: deny by default, in one place. The order is identity, scope, project, rate, audit; another project's job
is answered with the very error of a job that does not exist, so nobody learns which ids are taken.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import structlog
from google.protobuf.descriptor import FieldDescriptor

from byline.errors import BylineError, JobNotFound
from byline.security import audit
from byline.security.errors import MethodUnknown, ProjectForbidden, RateLimited, ScopeMissing, Unauthenticated
from byline.security.keys import KeyStore, refused
from byline.security.limits import RateLimits
from byline.security.scopes import LOCAL, Principal, set_current
from services.gateway.access import ACCESS, Access, project_of, resource_of
from services.gateway.key_lookups import KeyLookups

log = structlog.get_logger(__name__)

#: Open streams of one key in this gateway.
MAX_STREAMS = 200
#: What is known of a key is asked again after so long, should the announcement of its end be lost.
_REMEMBER_S = 30.0
_REMEMBERED = 10_000
#: Refusals that are recorded each second, of each key and of all callers without one together: a flood must not fill
#: the disk, and a stranger's must not hide what a key was refused.
_REFUSALS_PER_S = 20.0
_HEADER = "authorization"
_SCALARS = (
    FieldDescriptor.CPPTYPE_STRING, FieldDescriptor.CPPTYPE_BOOL, FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_ENUM,
)  # fmt: skip

Offload = Callable[..., Any]


class Guard:
    """Admits calls. ``keys`` None: no keys are asked for, everybody is ``LOCAL``. ``offload`` runs database work."""

    def __init__(
        self,
        keys: KeyStore | None,
        log_of_acts: audit.AuditLog,
        offload: Offload,
        *,
        rate_per_second: float = 0.0,
        project_rate_per_second: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lookups = None if keys is None else KeyLookups(partial(offload, keys.authenticate_all))
        self._audit = log_of_acts
        self._offload = offload
        self._rate = rate_per_second
        self._project_rate = project_rate_per_second
        self._clock = clock
        self._generation = 0
        self._known: OrderedDict[bytes, tuple[Principal, float]] = OrderedDict()
        self._limits = RateLimits()
        self._refusals = RateLimits()
        self._unrecorded: Counter[str] = Counter()
        self._streams: Counter[str] = Counter()

    def forget(self) -> None:
        """Ask for every key again: one was revoked, or news of it may have been missed."""
        self._generation += 1
        self._known.clear()

    async def admit(self, method: str, request: Any, metadata: Any) -> Principal:
        """Who makes this call, also as ``current_principal``.

        Unauthenticated, ScopeMissing, ProjectForbidden, JobNotFound (another project's), RateLimited.
        """
        principal, project_id = LOCAL, None
        if self._lookups is None and method not in ACCESS:
            return principal  # a method under development; the table's test names it
        try:
            if self._lookups is not None:
                principal = await self._identify(self._lookups, metadata)
            access = self._access(method)
            _check_scope(principal, access, method)
            project_id = project_of(access, request)
            _check_project(principal, access, project_id, request)
        except (Unauthenticated, ScopeMissing, ProjectForbidden, JobNotFound) as error:
            await self._record_refusal(method, principal, request, error)
            raise
        self._check_rate(principal, project_id, access.cost(request))
        if access.audited:
            await self._record(method, principal, project_id, request, audit.ALLOWED)
        set_current(principal)
        return principal

    async def failed(self, method: str, principal: Principal, request: Any, reason: str) -> None:
        """Record that a call whose beginning was recorded changed nothing."""
        access = ACCESS.get(method)
        if access is not None and access.audited:
            await self._record(method, principal, project_of(access, request), request, "FAILED", reason)

    @contextmanager
    def stream(self, principal: Principal) -> Iterator[None]:
        """Count an open stream. RateLimited if the key has too many of them."""
        if principal is not LOCAL and self._streams[principal.name] >= MAX_STREAMS:
            raise RateLimited(f"this key has {MAX_STREAMS} open streams; close some", 5.0, limit=MAX_STREAMS)
        self._streams[principal.name] += 1
        try:
            yield
        finally:
            self._streams[principal.name] -= 1
            if not self._streams[principal.name]:
                del self._streams[principal.name]

    def _access(self, method: str) -> Access:
        access = ACCESS.get(method)
        if access is None:
            raise MethodUnknown(f"{method} is not open to callers of this server", method=method)
        return access

    async def _identify(self, lookups: KeyLookups, metadata: Any) -> Principal:
        token = _token(metadata)
        remembered = hashlib.sha256(token.encode()).digest()
        known = self._known.get(remembered)
        if known is not None and known[1] > self._clock():
            return known[0]
        generation = self._generation
        principal = await lookups.principal(token)
        if generation == self._generation:  # else it may have been revoked while it was looked up
            self._known[remembered] = (principal, self._clock() + _REMEMBER_S)
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return principal

    def _check_rate(self, principal: Principal, project_id: str | None, cost: int) -> None:
        own = self._rate if principal.rate_per_second is None else principal.rate_per_second
        shared = self._project_rate if principal.project_rate_per_second is None else principal.project_rate_per_second
        wanted = {principal.name: own}
        if project_id is not None:
            wanted[f"project:{project_id}"] = shared
        refusal = self._limits.admit(wanted, float(cost), self._clock())
        if refusal is not None:
            name, wait_s = refusal
            raise RateLimited(
                f"{name} calls more often than its {wanted[name]:g} a second; try again in {wait_s:.2f} s",
                max(wait_s, 0.01), subject=name, rate_per_second=wanted[name],
            )  # fmt: skip

    async def _record_refusal(self, method: str, principal: Principal, request: Any, error: BylineError) -> None:
        name = "unknown" if isinstance(error, Unauthenticated) else principal.name
        if self._refusals.admit({name: _REFUSALS_PER_S}, 1.0, self._clock()) is not None:
            self._unrecorded[name] += 1
            return
        unrecorded = self._unrecorded.pop(name, 0)
        statement = audit.event(
            name, _short(method), resource_of(request), audit.DENIED, project_id=principal.project_id,
            detail={"reason": error.reason} | ({"unrecorded": unrecorded} if unrecorded else {}),
        )  # fmt: skip
        await self._offload(self._audit.record, statement)

    async def _record(
        self, method: str, principal: Principal, project_id: str | None, request: Any, decision: str, reason: str = ""
    ) -> None:
        detail = summary(request) | ({"reason_failed": reason} if reason else {})
        statement = audit.event(
            principal.name, _short(method), resource_of(request), decision, project_id=project_id, detail=detail
        )
        await self._offload(self._audit.record, statement)


def _token(metadata: Any) -> str:
    for key, value in metadata or ():
        if key == _HEADER and isinstance(value, str):
            kind, _, token = value.partition(" ")
            if kind.lower() == "bearer":
                return token.strip()
    raise refused()


def _check_scope(principal: Principal, access: Access, method: str) -> None:
    if access.scope not in principal.scopes:
        raise ScopeMissing(
            f"{_short(method)} needs a key with the scope {access.scope}", scope=access.scope, method=_short(method)
        )


def _check_project(principal: Principal, access: Access, project_id: str | None, request: Any) -> None:
    """A key of one project may name no other; what names none is open to it (the scopes keep it small)."""
    if principal.project_id is None or project_id is None or project_id == principal.project_id:
        return
    if access.project == "name":
        name = str(request.name)
        if "/attributionJobs/" in name:
            raise missing_job(project_id, name.rpartition("/")[2])
    raise ProjectForbidden(f"this key belongs to projects/{principal.project_id}", project=principal.project_id)


def missing_job(project_id: str, job_id: str) -> JobNotFound:
    """Word for word what ``reading`` says of a job that does not exist."""
    try:
        job_id = str(uuid.UUID(job_id))
    except ValueError:
        job_id = job_id[:80]
    return JobNotFound(f"project {project_id} has no job {job_id}", job=job_id)


def summary(request: Any) -> dict[str, Any]:
    """A request's scalars as the audit keeps them; of a list its length and digest. Never a prompt or an image."""
    found: dict[str, Any] = {}
    for field, value in getattr(request, "ListFields", list)():
        if field.cpp_type not in _SCALARS or field.type == FieldDescriptor.TYPE_BYTES or field.name == "prompt":
            continue
        if isinstance(value, (str, int, float)):
            found[field.name] = value[:500] if isinstance(value, str) else value
        else:
            joined = "\n".join(map(str, value)).encode()
            found[field.name] = {"count": len(value), "sha256": hashlib.sha256(joined).hexdigest()}
    return found


def _short(method: str) -> str:
    return method.rpartition("/")[2]
