"""The page of the API names every method and every error: a new one needs its row."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import byline.errors
import byline.security.errors
from byline.errors import BylineError

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "api.md").read_text()
#: Errors that neither a call nor a job ends with: of workers among themselves, of commands, of the client's own.
NOT_OF_THE_API = {
    "API_KEY_NOT_FOUND", "AUDIT_BROKEN", "BACKUP_FAILED", "BROKER_UNAVAILABLE", "CALL_FAILED", "CORPUS_NOT_USABLE",
    "GAVE_WAY", "ILLEGAL_TRANSITION", "ITEM_WITHDRAWN", "JOB_CANCELLED", "LABELS_NOT_USABLE", "LEASE_EXPIRED",
    "LEASE_LOST", "SERVER_NOT_STARTED", "SERVER_UNREACHABLE", "SETTINGS_INVALID", "STAGE_INPUT_MISSING",
    "WORKER_STOPPING",
}  # fmt: skip


def rows(head: str) -> list[list[str]]:
    """The cells of the table whose first line begins so."""
    table = PAGE[PAGE.index(f"\n| {head} |") + 1 :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]


def marked(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_every_method_of_every_service_stands_in_its_table() -> None:
    told = {marked(service)[0]: marked(calls) for service, _, calls in rows("service") if "grpc.health" not in service}
    known = {}
    for path in sorted((ROOT / "protos" / "attribution" / "v1").glob("*.proto")):
        module = importlib.import_module(f"attribution.v1.{path.stem}_pb2")
        for service in module.DESCRIPTOR.services_by_name.values():
            known[service.name] = sorted(method.name for method in service.methods)
    assert {service: sorted(calls) for service, calls in told.items()} == known


def test_every_error_that_a_caller_meets_stands_in_its_table_with_its_code() -> None:
    errors = {
        kind.reason: kind.code
        for module in (byline.errors, byline.security.errors)
        for _, kind in inspect.getmembers(module, inspect.isclass) if issubclass(kind, BylineError)
    }  # fmt: skip
    told = {reason: marked(code)[0] for reasons, code, _ in rows("reason") for reason in marked(reasons)}
    assert not NOT_OF_THE_API - set(errors), "these are gone"
    assert not NOT_OF_THE_API & set(told)
    assert told == {reason: code for reason, code in errors.items() if reason not in NOT_OF_THE_API}
