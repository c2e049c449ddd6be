"""What the servicers work with, built in one place.

Why it exists: one composition root, so a test passes its own stores and a servicer never reads a setting.
Everything below the servicers is synchronous; ``offload`` runs it on a bounded pool of threads.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, TypeVar

from sqlalchemy import Engine

from byline.catalog.blobs import BlobStore
from byline.catalog.store import CatalogStore
from byline.config import Settings
from byline.db.session import make_engine
from byline.errors import ServerBusy
from byline.jobs.states import Stage
from byline.jobs.store import JobStore
from byline.releases.registry import ReleaseRegistry
from byline.security.audit import AuditLog
from byline.security.keys import KeyStore
from byline.security.retention import Retention
from byline.security.signing import Keyring
from services.gateway.changes import JobChanges
from services.gateway.guard import Guard
from services.gateway.models import Manifests, Models
from services.gateway.page_tokens import PageTokens, derive_key
from services.gateway.requests import Limits
from services.gateway.transport import Transport, transport_of
from services.gateway.uploads import PartialUploads

P = ParamSpec("P")
R = TypeVar("R")

#: Threads that talk to Postgres and the blob store.
WORKERS = 16
#: Threads for what has pictures opened, which takes seconds: the one child that opens them is kept busy by two.
PICTURE_WORKERS = 2
#: One for each thread, and one for the health check.
CONNECTIONS = WORKERS + PICTURE_WORKERS + 1
#: No call waits so long: a thread whose statement is stuck is given back.
STATEMENT_S = 30.0
#: Calls that may wait for one of these threads: half a second of work; more would only grow old.
MOST_WAITING = 64


@dataclass(frozen=True)
class GatewayContext:
    """The gateway's collaborators."""

    engine: Engine
    jobs: JobStore
    blobs: BlobStore
    registry: ReleaseRegistry
    catalog: CatalogStore
    models: Models
    releases: Manifests
    changes: JobChanges
    tokens: PageTokens
    limits: Limits
    pool: ThreadPoolExecutor
    pictures: ThreadPoolExecutor
    guard: Guard
    audit: AuditLog
    transport: Transport
    uploads: PartialUploads
    retention: Retention
    trace_share: float = 1.0

    async def offload(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run synchronous work on the pool, in the caller's context: its log lines name the caller's trace."""
        return await _offload(self.pool, work, *args, **kwargs)

    async def offload_pictures(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """As ``offload``, for work that has pictures opened: it keeps no thread from anybody else."""
        return await _offload(self.pictures, work, *args, **kwargs)

    def close(self, within_s: float = 5.0) -> bool:
        """Stop listening and give the connections back. False if some work hangs on: it is waited for no longer."""
        ends = time.monotonic() + within_s
        self.changes.stop(within_s)
        closing = threading.Thread(target=self._end_threads, daemon=True)
        closing.start()
        closing.join(max(0.0, ends - time.monotonic()))
        self.engine.dispose()
        return not closing.is_alive()

    def _end_threads(self) -> None:
        for pool in (self.pool, self.pictures):
            pool.shutdown(cancel_futures=True)


def refuse_if_busy(context: GatewayContext) -> None:
    """Raise ServerBusy, before anything is done, when new work would only wait until its caller has given up: without
    this, a gateway offered three times what it can do answers hardly anybody."""
    if context.pool._work_queue.qsize() >= MOST_WAITING:
        raise ServerBusy(f"{MOST_WAITING} calls wait for this gateway already; try again in a second")


async def _offload(pool: ThreadPoolExecutor, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    call = partial(copy_context().run, work, *args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(pool, call)


def build_context(settings: Settings) -> GatewayContext:
    """Connect everything the settings name. Nothing is contacted yet. SettingsInvalid for bad certificates."""
    url = settings.database_url
    engine = make_engine(url, CONNECTIONS, application="byline-gateway", statement_timeout_s=STATEMENT_S)
    bounds = {
        Stage.LOOKUP: settings.lookup_queue_bound,
        Stage.VERIFY: settings.verification_queue_bound,
        Stage.ESTIMATE: settings.verification_queue_bound,
        Stage.RANK: settings.verification_queue_bound,
    }
    catalog = CatalogStore(engine)
    registry = ReleaseRegistry(engine)
    blobs = BlobStore(settings.blob_dir)
    pool = ThreadPoolExecutor(max_workers=WORKERS, thread_name_prefix="gateway")
    audit = AuditLog(engine, Keyring.parse(settings.signing_key))
    guard = Guard(
        KeyStore(engine) if settings.auth_mode == "keys" else None,
        audit,
        partial(_offload, pool),
        rate_per_second=settings.rate_per_second,
        project_rate_per_second=settings.project_rate_per_second,
    )
    return GatewayContext(
        engine=engine,
        jobs=JobStore(engine, bounds, project_share=settings.project_queue_share),
        blobs=blobs,
        registry=registry,
        catalog=catalog,
        models=Models(catalog),
        releases=Manifests(registry),
        changes=JobChanges(guard.forget),
        tokens=PageTokens(derive_key(settings.page_token_key, url)),
        limits=Limits.of(settings),
        pool=pool,
        pictures=ThreadPoolExecutor(max_workers=PICTURE_WORKERS, thread_name_prefix="pictures"),
        guard=guard,
        audit=audit,
        transport=transport_of(settings),
        uploads=PartialUploads(settings.blob_dir),
        retention=Retention(engine, blobs, settings.retention_days),
        trace_share=settings.trace_share,
    )
