"""What a gateway does beside answering: it links the audit's events into their chain and forgets.

Why it exists: the chain must not make callers wait, and must grow while nobody looks; what has
expired must go although nobody asks for it. Any number of gateways may do
this; a lock lets one at a time.
"""

from __future__ import annotations

import asyncio

import structlog

from byline.errors import DatabaseUnavailable
from services.gateway.context import GatewayContext

log = structlog.get_logger(__name__)

_SEAL_EVERY_S = 1.0
_MOST = 1_000
#: The chain's end goes to the log so often: a copy that a database's owner cannot change.
_NOTE_EVERY_S = 300.0
_SWEEP_EVERY_S = 600.0


async def keep_house(context: GatewayContext) -> None:
    """Seal the audit and forget what has expired, again and again until cancelled."""
    loop = asyncio.get_running_loop()
    noted = swept = loop.time()
    sealed = 0
    while True:
        linked = 0
        try:
            linked = await context.offload(context.audit.seal, _MOST)
            sealed += linked
            if sealed and loop.time() - noted >= _NOTE_EVERY_S:
                log.info("audit_head", head=str(await context.offload(context.audit.head)))
                noted, sealed = loop.time(), 0
            if loop.time() - swept >= _SWEEP_EVERY_S:
                swept = loop.time()
                await _sweep(context)
        except DatabaseUnavailable as error:
            log.warning("house_not_kept", reason=error.reason)
        except OSError as error:  # the blobs' disk: the next round tries again
            log.warning("images_not_removed", error=type(error).__name__)
        if linked < _MOST:
            await asyncio.sleep(_SEAL_EVERY_S)


async def _sweep(context: GatewayContext) -> None:
    await context.offload(context.uploads.sweep)
    while deleted := await context.offload(context.retention.sweep):
        log.info("jobs_expired", jobs=deleted)
