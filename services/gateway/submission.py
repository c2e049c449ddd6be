"""From a checked request to a committed row: store the image, look at the release, create the job.

Why it exists: Create, BatchCreate and Attribute must admit a job in exactly the same way. Synchronous; runs on
the gateway's thread pool in one piece, so an RPC costs one hop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from byline.errors import (
    BlobNotFound,
    BylineError,
    InvalidRequest,
    NoActiveRelease,
    ReleaseNotEligible,
    TierNotAvailable,
)
from byline.jobs.model import Job, NewJob
from byline.jobs.states import Tier
from services.gateway.context import GatewayContext
from services.gateway.requests import Asked


def submit(context: GatewayContext, asked: Asked) -> Job:
    """Commit one job (or find the one this request id made before)."""
    admit(context, asked)
    job, _ = context.jobs.create(_with_image(context, asked))
    return job


def submit_many(context: GatewayContext, many: Sequence[Asked]) -> list[Job]:
    """Commit all jobs in one transaction, or none."""
    for asked in many:
        admit(context, asked)
    return [job for job, _ in context.jobs.create_many([_with_image(context, asked) for asked in many])]


def admit(context: GatewayContext, asked: Asked) -> None:
    """Refuse what no worker could answer, unless it is a request that was admitted before.

    A client that repeats its request must get its job, also when the release has changed in between.
    """
    try:
        _check(context, asked)
    except BylineError:
        if not context.jobs.asked_before(asked.job.project_id, asked.job.request_id):
            raise


def _check(context: GatewayContext, asked: Asked) -> None:
    """Unknown model, no release, a tier it does not serve, unknown image, another head's embedding."""
    new = asked.job
    context.models.corpus_of(new.model_id)
    active = context.registry.active(new.model_id)
    if active is None:
        raise NoActiveRelease(f"model {new.model_id} has no active release yet; try again soon", model=new.model_id)
    if new.tier is Tier.ESTIMATED and context.registry.get(active.release_id).manifest.sketches is None:
        raise TierNotAvailable(
            "options.tier",
            f"the active release {active.release_id} has no sketches, which ESTIMATED needs; ask for RETRIEVED or "
            "VERIFIED",
            release_id=active.release_id,
        )
    if new.image_sha256 is not None and not context.blobs.exists(new.image_sha256):
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
    dim = context.registry.get(active.release_id).manifest.embedding_dim
    if len(new.embedding) != dim:
        raise InvalidRequest(
            "query.embedding.values", f"has {len(new.embedding)} values; release {active.release_id} needs {dim}"
        )


def _with_image(context: GatewayContext, asked: Asked) -> NewJob:
    if asked.inline_image is None:
        return asked.job
    return replace(asked.job, image_sha256=context.blobs.put(asked.inline_image))
