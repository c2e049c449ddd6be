"""One interceptor around every call: deadline, admission, typed errors, metrics and one log line for what went wrong.

Why it exists: handlers contain no ``context.abort`` and no timeout. gRPC has no default deadline, so a call
without one gets ours; an exception that is not typed is a bug, and of a bug the client sees only an id. Also what
gRPC itself would refuse (an unknown method, bytes that are no message) is refused here, as a typed error.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, status_pb2
from grpc_status import rpc_status

from byline import tracing
from byline.errors import InvalidRequest, WatchEnded
from byline.security.errors import MalformedRequest, MethodUnknown
from byline.security.scopes import Principal
from byline.telemetry import RPC_IN_FLIGHT
from services.gateway import status as statuses
from services.gateway.guard import Guard

log = structlog.get_logger(__name__)

Observe = Callable[[str, str, float], None]
#: Methods of other packages (health, reflection) are passed through untouched.
_OWN = "/attribution.v1."
#: Stands for every method there is none of: what strangers make up must not become labels of a metric.
_UNKNOWN = f"{_OWN}unknown"


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Caps the time of unary calls at ``max_call_s`` and turns exceptions into ``google.rpc.Status``.

    ``observe(method, code, seconds)`` is called at the end of each call. The seconds of a stream are those to its first
    message, as it may live for minutes; one that the server ends as announced (WATCH_ENDED) ends well.
    """

    def __init__(self, max_call_s: float, observe: Observe, guard: Guard, trace_share: float = 1.0) -> None:
        """``trace_share``: of the traces that begin here so many are sampled."""
        self._max_call_s = max_call_s
        self._trace_share = trace_share
        self._observe = observe
        self._guard = guard

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """Wrap the handler of one of our methods."""
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        if not method.startswith(_OWN):
            return handler
        if handler is None:
            return grpc.unary_unary_rpc_method_handler(self._unary(_UNKNOWN, _no_such_method(method)))
        codec = {
            "request_deserializer": _careful(handler.request_deserializer),
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(self._unary(method, self._one(method, handler)), **codec)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(self._unary(method, self._many(method, handler)), **codec)
        return grpc.unary_stream_rpc_method_handler(self._stream(method, handler.unary_stream), **codec)

    def _one(self, method: str, handler: Any) -> Callable[[Any, Any], Awaitable[Any]]:
        """A handler of one request."""

        async def admitted(request: Any, context: Any) -> Any:
            principal = await self._guard.admit(method, _sound(request), context.invocation_metadata())
            refuse_nul(request)
            async with self._recorded(method, principal, request):
                return await handler.unary_unary(request, context)

        return admitted

    def _many(self, method: str, handler: Any) -> Callable[[Any, Any], Awaitable[Any]]:
        """A handler of a stream of requests: the first one says for whom."""

        async def admitted(requests: AsyncIterator[Any], context: Any) -> Any:
            stream = aiter(requests)
            first = await anext(stream, None)
            await self._guard.admit(method, _sound(first), context.invocation_metadata())
            return await handler.stream_unary(_rejoined(first, stream), context)

        return admitted

    @asynccontextmanager
    async def _recorded(self, method: str, principal: Principal, request: Any) -> AsyncIterator[None]:
        try:
            yield
        except Exception as error:
            await self._guard.failed(method, principal, request, getattr(error, "reason", "INTERNAL"))
            raise

    def _unary(
        self, method: str, behavior: Callable[[Any, Any], Awaitable[Any]]
    ) -> Callable[[Any, Any], Awaitable[Any]]:
        async def call(request: Any, context: Any) -> Any:
            with RPC_IN_FLIGHT.track_inprogress(), tracing.within(_span(context, self._trace_share)):
                return await timed(request, context)

        async def timed(request: Any, context: Any) -> Any:
            begun = time.perf_counter()
            code = "OK"
            try:
                async with asyncio.timeout(self._allowed(context)):
                    return await behavior(request, context)
            except asyncio.CancelledError:
                code = "CANCELLED"
                raise
            except Exception as error:
                status = self._status(method, error)
                code = code_pb2.Code.Name(status.code)
                await _abort(context, status)
            finally:
                seconds = time.perf_counter() - begun
                self._observe(method, code, seconds)
                if (trace := tracing.told()) is not None:
                    tracing.finish(_finished(trace, method, code, seconds))

        return call

    def _stream(
        self, method: str, behavior: Callable[[Any, Any], AsyncIterator[Any]]
    ) -> Callable[[Any, Any], AsyncIterator[Any]]:
        async def call(request: Any, context: Any) -> AsyncIterator[Any]:
            begun = time.perf_counter()
            answered: float | None = None
            code = "OK"
            try:
                principal = await self._guard.admit(method, _sound(request), context.invocation_metadata())
                refuse_nul(request)
                with self._guard.stream(principal):
                    async for response in behavior(request, context):
                        answered = answered or time.perf_counter()
                        yield response
            except (asyncio.CancelledError, GeneratorExit):
                code = "CANCELLED"
                raise
            except Exception as error:
                status = self._status(method, error)
                code = "OK" if isinstance(error, WatchEnded) else code_pb2.Code.Name(status.code)
                await _abort(context, status)
            finally:
                self._observe(method, code, (answered or time.perf_counter()) - begun)

        return call

    def _allowed(self, context: Any) -> float:
        remaining = context.time_remaining()
        return self._max_call_s if remaining is None else min(remaining, self._max_call_s)

    def _status(self, method: str, error: Exception) -> status_pb2.Status:
        known = statuses.typed(error)
        if known is not None:
            if known.code in ("UNAVAILABLE", "INTERNAL", "DEADLINE_EXCEEDED"):
                log.warning("call_failed", method=method, code=known.code, reason=known.reason)
            return statuses.from_error(known)
        error_id = uuid.uuid4().hex[:16]
        log.error("call_crashed", method=method, error_id=error_id, exc_info=error)
        return statuses.internal(error_id)


@dataclass(frozen=True)
class _Unreadable:
    """Stands for a request whose bytes are no message, until the error can be told."""


def _careful(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """gRPC answers a failure in here with a status of its own, without reason."""

    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _Unreadable()

    return read


def _sound(request: Any) -> Any:
    if isinstance(request, _Unreadable):
        raise MalformedRequest("request", "the bytes are not a message of this method: are the protos the server's?")
    return request


def refuse_nul(message: Any, prefix: str = "") -> None:
    """InvalidRequest for the first text with a NUL character: Postgres can keep none, and no text needs one."""
    for field, value in message.ListFields():
        if field.cpp_type == field.CPPTYPE_STRING and field.type != field.TYPE_BYTES:
            if any("\0" in text for text in (value if field.is_repeated else (value,))):
                raise InvalidRequest(f"{prefix}{field.name}", "must not contain NUL characters")
        elif field.cpp_type == field.CPPTYPE_MESSAGE and not field.message_type.GetOptions().map_entry:
            for position, inner in enumerate(value if field.is_repeated else (value,)):
                refuse_nul(inner, f"{prefix}{field.name}{f'[{position}]' if field.is_repeated else ''}.")


async def _rejoined(first: Any, rest: AsyncIterator[Any]) -> AsyncIterator[Any]:
    if first is not None:
        refuse_nul(first)
        yield first
    async for message in rest:
        yield _sound(message)


def _no_such_method(method: str) -> Callable[[Any, Any], Awaitable[Any]]:
    async def refuse(request: Any, context: Any) -> Any:
        raise MethodUnknown(f"this server has no method {method[:200]}", method=method[:200])

    return refuse


def _span(context: Any, share: float) -> tracing.Trace:
    """A span under the caller's, if the caller named one in the metadata."""
    header = next((value for key, value in context.invocation_metadata() or () if key == tracing.HEADER), None)
    return tracing.span(header if isinstance(header, str) else None, share=share)


def _finished(trace: tracing.Trace, method: str, code: str, seconds: float) -> tracing.Finished:
    service, _, name = method.lstrip("/").rpartition("/")
    facts = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name, "rpc.grpc.status_code": code}
    failed = code in ("INTERNAL", "UNKNOWN", "UNAVAILABLE", "DATA_LOSS", "DEADLINE_EXCEEDED", "UNIMPLEMENTED")
    return tracing.Finished(
        trace, method.lstrip("/"), seconds, serves=True, error=code if failed else "", attributes=facts
    )


async def _abort(context: Any, status: status_pb2.Status) -> None:
    sent = rpc_status.to_status(status)
    await context.abort(sent.code, sent.details, sent.trailing_metadata)
