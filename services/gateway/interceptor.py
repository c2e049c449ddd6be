"""One interceptor around every call: deadline, typed errors, metrics and one log line for what went wrong.

Why it exists: handlers contain no ``context.abort`` and no timeout. gRPC has no default deadline, so a call
without one gets ours; an exception that is not typed is a bug, and of a bug the client sees only an id.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import structlog
from google.rpc import code_pb2, status_pb2
from grpc_status import rpc_status

from byline import tracing
from byline.telemetry import RPC_IN_FLIGHT
from services.gateway import status as statuses

log = structlog.get_logger(__name__)

Observe = Callable[[str, str, float], None]
#: Methods of other packages (health, reflection) are passed through untouched.
_OWN = "/attribution.v1."


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Caps the time of unary calls at ``max_call_s`` and turns exceptions into ``google.rpc.Status``.

    ``observe(method, code, seconds)`` is called once for each unary call; a stream may live for minutes.
    """

    def __init__(self, max_call_s: float, observe: Observe) -> None:
        self._max_call_s = max_call_s
        self._observe = observe

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """Wrap the handler of one of our methods."""
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None or not method.startswith(_OWN):
            return handler
        codec = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(self._unary(method, handler.unary_unary), **codec)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(self._unary(method, handler.stream_unary), **codec)
        return grpc.unary_stream_rpc_method_handler(self._stream(method, handler.unary_stream), **codec)

    def _unary(
        self, method: str, behavior: Callable[[Any, Any], Awaitable[Any]]
    ) -> Callable[[Any, Any], Awaitable[Any]]:
        async def call(request: Any, context: Any) -> Any:
            with RPC_IN_FLIGHT.track_inprogress(), tracing.within(_span(context)):
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
                self._observe(method, code, time.perf_counter() - begun)

        return call

    def _stream(
        self, method: str, behavior: Callable[[Any, Any], AsyncIterator[Any]]
    ) -> Callable[[Any, Any], AsyncIterator[Any]]:
        async def call(request: Any, context: Any) -> AsyncIterator[Any]:
            try:
                async for response in behavior(request, context):
                    yield response
            except Exception as error:
                await _abort(context, self._status(method, error))

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


def _span(context: Any) -> tracing.Trace:
    """A span under the caller's, if the caller named one in the metadata."""
    header = next((value for key, value in context.invocation_metadata() or () if key == tracing.HEADER), None)
    return tracing.span(header if isinstance(header, str) else None)


async def _abort(context: Any, status: status_pb2.Status) -> None:
    sent = rpc_status.to_status(status)
    await context.abort(sent.code, sent.details, sent.trailing_metadata)
