"""What a gateway does beside answering: it links the audit's events into their chain.

Why it exists: the chain must not make callers wait, and must grow while nobody looks. Any number of gateways may do
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


async def keep_house(context: GatewayContext) -> None:
    """Seal the audit again and again until cancelled."""
    loop = asyncio.get_running_loop()
    noted, sealed = loop.time(), 0
    while True:
        linked = 0
        try:
            linked = await context.offload(context.audit.seal, _MOST)
            sealed += linked
            if sealed and loop.time() - noted >= _NOTE_EVERY_S:
                log.info("audit_head", head=str(await context.offload(context.audit.head)))
                noted, sealed = loop.time(), 0
        except DatabaseUnavailable as error:
            log.warning("audit_not_sealed", reason=error.reason)
        if linked < _MOST:
            await asyncio.sleep(_SEAL_EVERY_S)
