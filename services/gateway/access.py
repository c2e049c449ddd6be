"""Which method needs which scope, and where its request names the project.

Why it exists: a method without a row here is refused where keys are asked for, and a test walks through the
descriptors of every service and fails for each method that has none. So nobody can add an RPC and forget who may
call it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from byline.security.scopes import Scope

PACKAGE = "attribution.v1"


@dataclass(frozen=True, slots=True)
class Access:
    """What a call needs. ``project``: the field with the project's (or its job's) resource name, dots going inside;
    empty for what belongs to no project. ``audited``: the call is recorded before it is carried out. ``cost``: how
    many calls it counts as."""

    scope: Scope
    project: str = ""
    audited: bool = False
    cost: Callable[[Any], int] = lambda request: 1


_WRITE, _READ = Scope.JOBS_WRITE, Scope.JOBS_READ
_SEE, _CHANGE = Scope.CATALOG_READ, Scope.CATALOG_WRITE
_LOOK, _ACT = Scope.OPERATE_READ, Scope.OPERATE

_ATTRIBUTION = {
    # Created jobs are recorded by the database itself, in the transaction that makes them.
    "CreateAttributionJob": Access(_WRITE, "parent"),
    "BatchCreateAttributionJobs": Access(_WRITE, "parent", cost=lambda request: max(1, len(request.requests))),
    "Attribute": Access(_WRITE, "parent"),
    "UploadImage": Access(_WRITE, "metadata.parent"),
    "GetImageUpload": Access(_WRITE, "name"),
    "CancelAttributionJob": Access(_WRITE, "name", audited=True),
    "DeleteAttributionJob": Access(_WRITE, "name", audited=True),
    "GetAttributionJob": Access(_READ, "name"),
    "ListAttributionJobs": Access(_READ, "parent"),
    "WatchAttributionJob": Access(_READ, "name"),
    "DownloadQueryImage": Access(_READ, "name"),
}
_CATALOG = {
    "ListModels": Access(_SEE),
    "BatchGetItems": Access(_SEE),
    "GetItemImage": Access(_SEE),
    "GetCorpus": Access(_SEE),
    "GetWithdrawal": Access(_SEE),
    "AddItems": Access(_CHANGE, audited=True),
    "WithdrawItems": Access(_CHANGE, audited=True),
}
_OPERATOR = {
    "ListReleases": Access(_LOOK),
    "ActivateRelease": Access(_ACT, audited=True),
    "RollbackRelease": Access(_ACT, audited=True),
    "GetQueueStatus": Access(_LOOK),
    "ListDeadJobs": Access(_LOOK, "parent"),
    "RetryDeadJob": Access(_ACT, "name", audited=True),
    "DiscardDeadJob": Access(_ACT, "name", audited=True),
    "PauseStage": Access(_ACT, audited=True),
    "ResumeStage": Access(_ACT, audited=True),
    "DrainWorker": Access(_ACT, audited=True),
    "ResumeWorker": Access(_ACT, audited=True),
    "ListJobEvents": Access(_LOOK, "name"),
}
_CURATION = {
    "GetCuration": Access(_LOOK),
    "GetLabelStatistics": Access(_LOOK),
    "GetDrift": Access(_LOOK),
    "PauseCuration": Access(_ACT, audited=True),
    "ResumeCuration": Access(_ACT, audited=True),
    "SetCurationBudget": Access(_ACT, audited=True),
    "CloseDriftAlarm": Access(_ACT, audited=True),
}
_RELEASE = {
    "GetFleetStatus": Access(_LOOK),
    "RefreshRelease": Access(_ACT, audited=True),
    "GetReleaseRefresh": Access(_LOOK),
}
#: Full method path, as gRPC gives it, to what it needs.
ACCESS: dict[str, Access] = {
    f"/{PACKAGE}.{service}/{method}": access
    for service, methods in (
        ("AttributionService", _ATTRIBUTION),
        ("CatalogService", _CATALOG),
        ("OperatorService", _OPERATOR),
        ("CurationService", _CURATION),
        ("ReleaseService", _RELEASE),
    )
    for method, access in methods.items()
}


def project_of(access: Access, request: Any) -> str | None:
    """The project a request names, None if it names none or not in the form of a name (its handler refuses that)."""
    if not access.project:
        return None
    value = request
    for part in access.project.split("."):
        value = getattr(value, part, None)
    collection, _, rest = str(value).partition("/")
    return rest.partition("/")[0] if collection == "projects" else None


def resource_of(request: Any) -> str:
    """What a request is about, for the audit: its name, parent, model, worker or stage."""
    for field in ("name", "parent", "model", "corpus", "worker_id", "stage"):
        value = getattr(request, field, "")
        if isinstance(value, str) and value:
            return value[:300]
    return ""
