"""From a checked request to a committed row: store the image, look at the release, create the job.

Why it exists: Create, BatchCreate and Attribute must admit a job in exactly the same way. Synchronous; runs on
the gateway's thread pool in one piece, so an RPC costs one hop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy import Connection

from byline.db.session import single_statements, transaction
from byline.errors import (
    BlobNotFound,
    BylineError,
    InvalidRequest,
    NoActiveRelease,
    ReleaseNotEligible,
    TierNotAvailable,
)
from byline.failpoints import failpoint
from byline.jobs.model import Job, NewJob
from byline.jobs.states import Tier
from byline.security.scopes import current_principal
from services.gateway.context import GatewayContext
from services.gateway.images import is_owned
from services.gateway.requests import Asked


def submit(context: GatewayContext, asked: Asked) -> Job:
    """Commit one job (or find the one this request id made before)."""
    return submit_many(context, [asked])[0]


def submit_many(context: GatewayContext, many: Sequence[Asked], *, flush: bool = True) -> list[Job]:
    """Commit all jobs in one transaction, or none; what is asked of the database is asked in that transaction.

    Without ``flush`` the commit is not waited for on disk. The caller must not acknowledge such a job before its stage
    has ended (that commit is flushed, and with it all before it), or else call ``context.jobs.flush`` first.
    """
    if len(many) == 1:  # two statements, mostly
        with single_statements(context.engine) as connection:
            _admit(context, connection, many[0])
            failpoint("gateway.before_commit")
            job = context.jobs.create_alone(connection, _with_image(context, many[0]), flush=flush)
        if job is not None:
            failpoint("gateway.after_commit")
            return [job]
    with transaction(context.engine) as connection:
        for asked in many:
            _admit(context, connection, asked)
        news = [_with_image(context, asked) for asked in many]
        jobs = [job for job, _ in context.jobs.create_within(connection, news, flush=flush)]
        failpoint("gateway.before_commit")
    failpoint("gateway.after_commit")
    return jobs


def admit(context: GatewayContext, asked: Asked) -> None:
    """Refuse what no worker could answer, unless it is a request that was admitted before."""
    with transaction(context.engine) as connection:
        _admit(context, connection, asked)


def _admit(context: GatewayContext, connection: Connection, asked: Asked) -> None:
    """A client that repeats its request must get its job, also when the release has changed in between."""
    try:
        _check(context, connection, asked)
    except BylineError:
        if not context.jobs.asked_before(connection, asked.job.project_id, asked.job.request_id):
            raise


def _check(context: GatewayContext, connection: Connection, asked: Asked) -> None:
    """Unknown model, no release, a tier it does not serve, unknown image, another head's embedding."""
    new = asked.job
    context.models.corpus_of(new.model_id, connection)
    active = context.registry.active_within(connection, new.model_id)
    if active is None:
        raise NoActiveRelease(f"model {new.model_id} has no active release yet; try again soon", model=new.model_id)
    if new.tier is Tier.ESTIMATED and context.releases.manifest(active.release_id, connection).sketches is None:
        raise TierNotAvailable(
            "options.tier",
            f"the active release {active.release_id} has no sketches, which ESTIMATED needs; ask for RETRIEVED or "
            "VERIFIED",
            release_id=active.release_id,
        )
    if new.image_sha256 is not None and not (
        is_owned(connection, new.project_id, new.image_sha256) and context.blobs.touch(new.image_sha256)
    ):
        raise BlobNotFound(
            f"no image with sha256 {new.image_sha256} is stored; send it with UploadImage", sha256=new.image_sha256
        )
    if new.embedding is None:
        return
    if asked.embedding_release_id != active.release_id:
        raise ReleaseNotEligible(
            f"the embedding was made with release {asked.embedding_release_id}, but {active.release_id} is active; "
            "embed the image again",
            embedding_release=asked.embedding_release_id, active_release=active.release_id,
        )  # fmt: skip
    dim = context.releases.manifest(active.release_id, connection).embedding_dim
    if len(new.embedding) != dim:
        raise InvalidRequest(
            "query.embedding.values", f"has {len(new.embedding)} values; release {active.release_id} needs {dim}"
        )


def _with_image(context: GatewayContext, asked: Asked) -> NewJob:
    principal = current_principal().name
    if asked.inline_image is None:
        return replace(asked.job, principal=principal)
    return replace(asked.job, principal=principal, image_sha256=context.blobs.put(asked.inline_image))
