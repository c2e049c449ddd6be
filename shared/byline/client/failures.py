"""gRPC's failures back to the typed errors they were on the server.

Why it exists: ``except NoActiveRelease`` must work on both sides of the wire. The stable ``reason`` of the
ErrorInfo names the class; what no Byline server said becomes ``ServerUnreachable`` or ``CallTimedOut``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
from google.rpc import status_pb2
from grpc_status import rpc_status

from byline.client import wire
from byline.client.values import Problem
from byline.errors import BylineError, CallFailed, CallTimedOut, ServerUnreachable
from byline.security import errors as _security_errors  # noqa: F401 - their reasons are told apart too


def from_call(error: grpc.RpcError, address: str) -> BylineError:
    """The typed error behind a failed call."""
    problem = _problem(error)
    if problem is not None:
        return from_problem(problem)
    code, details = error.code(), error.details()
    if code is grpc.StatusCode.UNAVAILABLE:
        return ServerUnreachable(f"no Byline server answers at {address}", address=address, details=details)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return CallTimedOut(f"no answer from {address} within the timeout", address=address)
    return CallFailed(f"the call failed with {code.name}: {details}", code=code.name, details=details)


def from_problem(problem: Problem) -> BylineError:
    """The typed error of a problem, with the server's message."""
    kind = _BY_REASON.get(problem.reason)
    if kind is None:
        return CallFailed(problem.message, **{**problem.metadata, "code": problem.code, "reason": problem.reason})
    # Not through __init__: subclasses compose their message there, and this one is composed already.
    error = kind.__new__(kind)
    BylineError.__init__(error, problem.message, **problem.metadata)
    if "field" in problem.metadata:
        vars(error)["field"] = problem.metadata["field"]
    return error


def _problem(error: Any) -> Problem | None:
    """The problem a Byline server described in the trailing metadata, if it did."""
    for key, value in error.trailing_metadata() or ():
        if key == rpc_status.GRPC_DETAILS_METADATA_KEY:
            problem = wire.problem(status_pb2.Status.FromString(value))
            return problem if problem.reason else None
    return None


def _subclasses(kind: type[BylineError]) -> Iterator[type[BylineError]]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


_BY_REASON = {kind.reason: kind for kind in _subclasses(BylineError) if "reason" in vars(kind)}
