"""The connections that pages and doctor tell operators to reckon with are those the programs may hold."""

from __future__ import annotations

import inspect
from pathlib import Path

import byline.doctor.database
from services.gateway.context import CONNECTIONS
from services.workers.child import _POOL_SIZE

DOCS = Path(__file__).resolve().parents[2] / "docs"
#: Their pools; a gateway listens with one more, a lookup worker with one, and with one for each model's release.
GATEWAY, LOOKUP, VERIFICATION = CONNECTIONS + 1, _POOL_SIZE + 2, _POOL_SIZE


def test_the_connections_of_a_gateway_and_of_a_worker_are_told_as_they_are() -> None:
    advice = inspect.getsource(byline.doctor.database)
    assert f"a gateway takes up to {GATEWAY}, a worker up to {LOOKUP}" in advice
    runbooks = (DOCS / "runbooks.md").read_text()
    assert f"A gateway takes up to {GATEWAY} connections, a lookup worker {LOOKUP}" in runbooks
    assert f"verification\nworker {VERIFICATION}," in runbooks
    operations = (DOCS / "operations.md").read_text()
    assert f"lookup worker holds up to {LOOKUP} connections" in operations
    assert f"a verification worker up to {VERIFICATION}." in operations
