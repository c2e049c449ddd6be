"""What a client may ask: requests of the wire checked and turned into ``NewJob``.

Why it exists: every bound of the API (sizes, ranges, names, tiers) is enforced here, before anything is
stored, and each refusal names the field as the client wrote it. Pure: no database, no clock, no blob store.
"""

from __future__ import annotations

import math
import uuid
from dataclasses import dataclass
from typing import Any

from attribution.v1 import attribution_job_pb2 as wire
from byline import tracing
from byline.catalog.sniff import sniff
from byline.config import Settings
from byline.errors import ImageTooLarge, InvalidRequest, PromptTooLong
from byline.jobs.model import NewJob
from byline.jobs.states import Tier, Verification
from services.gateway import names

MAX_INLINE_BYTES = 3 * 1024 * 1024
MAX_TTL_S = 7 * 24 * 3600.0
MAX_EMBEDDING_DIM = 8192

_TIERS: dict[int, Tier] = {
    wire.TIER_UNSPECIFIED: Tier.RETRIEVED,
    wire.TIER_RETRIEVED: Tier.RETRIEVED,
    wire.TIER_ESTIMATED: Tier.ESTIMATED,
    wire.TIER_VERIFIED: Tier.VERIFIED,
}
_VERIFICATIONS: dict[int, Verification] = {
    wire.VERIFICATION_UNSPECIFIED: Verification.REQUIRED,
    wire.VERIFICATION_REQUIRED: Verification.REQUIRED,
    wire.VERIFICATION_BEST_EFFORT: Verification.BEST_EFFORT,
}


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of this server, from its settings."""

    default_model_id: str
    default_top_k: int
    max_top_k: int
    default_candidates: int
    max_prompt_characters: int
    max_image_bytes: int
    max_image_pixels: int
    default_ttl_s: float
    max_attempts: int
    #: From so many rankings on curation asks for no more; 0: no limit. Shown, and held by curation itself.
    max_rankings: int = 0

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        """The limits the settings state."""
        return cls(
            default_model_id=settings.model_id,
            default_top_k=settings.default_top_k,
            max_top_k=settings.max_top_k,
            default_candidates=settings.verify_candidates,
            max_prompt_characters=settings.max_prompt_characters,
            max_image_bytes=settings.max_image_bytes,
            max_image_pixels=settings.max_image_pixels,
            default_ttl_s=settings.job_ttl_seconds,
            max_attempts=settings.max_attempts,
            max_rankings=settings.curation_max_rankings,
        )


@dataclass(frozen=True, slots=True)
class Asked:
    """A checked request. ``job.image_sha256`` is still None where ``inline_image`` must be stored first."""

    job: NewJob
    inline_image: bytes | None = None
    #: The release whose head made the embedding; it must be the active one.
    embedding_release_id: str | None = None


def new_job(
    project_id: str, model: str, query: wire.Query, options: wire.JobOptions, request_id: str, limits: Limits,
    prefix: str = "",
) -> Asked:  # fmt: skip
    """Check one request. InvalidRequest and its kin name the field, ``prefix`` put before it."""
    model_id = names.parse_model(model, f"{prefix}model") if model else limits.default_model_id
    tier = _tier(options.tier, f"{prefix}options.tier")
    top_k, candidates = _counts(options, tier, limits, prefix)
    if len(query.prompt) > limits.max_prompt_characters:
        limit = limits.max_prompt_characters
        raise PromptTooLong(
            f"{prefix}query.prompt", f"{len(query.prompt)} characters are over the limit of {limit}", limit=limit
        )
    if "\x00" in query.prompt:
        raise InvalidRequest(f"{prefix}query.prompt", "must not contain NUL characters")
    inline, sha256, embedding, release_id = _source(project_id, model_id, query, limits, prefix)
    if embedding is not None and tier is not Tier.RETRIEVED:
        raise InvalidRequest(f"{prefix}options.tier", "only RETRIEVED can be answered from an embedding")
    return Asked(
        job=NewJob(
            project_id=project_id,
            request_id=_request_id(request_id, f"{prefix}request_id"),
            model_id=model_id,
            prompt=query.prompt,
            image_sha256=sha256,
            embedding=embedding,
            tier=tier,
            verification=_verification(options.verification, f"{prefix}options.verification"),
            top_k=top_k,
            candidates=candidates,
            ttl_s=_ttl(options, limits, f"{prefix}options.ttl"),
            payload=_payload(options, release_id, f"{prefix}options.copies"),
            max_attempts=limits.max_attempts,
            traceparent=str(trace) if (trace := tracing.current()) else None,
        ),
        inline_image=inline,
        embedding_release_id=release_id,
    )


def _payload(options: wire.JobOptions, release_id: str | None, field: str) -> dict[str, Any]:
    if options.copies not in wire.Copies.values():
        raise InvalidRequest(field, "must be TOGETHER or APART", value=options.copies)
    apart = {"copies": "apart"} if options.copies == wire.COPIES_APART else {}
    consent = {"may_learn": "true"} if options.labelling_consent else {}
    return apart | consent | ({"embedding_release_id": release_id} if release_id else {})


def _tier(value: int, field: str) -> Tier:
    if value not in _TIERS:
        raise InvalidRequest(field, "is not a tier of this server", value=value)
    return _TIERS[value]


def _verification(value: int, field: str) -> Verification:
    if value not in _VERIFICATIONS:
        raise InvalidRequest(field, "must be REQUIRED or BEST_EFFORT", value=value)
    return _VERIFICATIONS[value]


def _counts(options: wire.JobOptions, tier: Tier, limits: Limits, prefix: str) -> tuple[int, int]:
    top_k = options.top_k or limits.default_top_k
    if not 1 <= top_k <= limits.max_top_k:
        raise InvalidRequest(f"{prefix}options.top_k", f"must be 1 to {limits.max_top_k}", value=top_k)
    if options.candidates and tier is not Tier.VERIFIED:
        raise InvalidRequest(f"{prefix}options.candidates", "needs tier VERIFIED")
    candidates = options.candidates or max(top_k, limits.default_candidates)
    if not top_k <= candidates <= limits.max_top_k:
        raise InvalidRequest(
            f"{prefix}options.candidates", f"must be top_k ({top_k}) to {limits.max_top_k}", value=candidates
        )
    return top_k, candidates


def _source(
    project_id: str, model_id: str, query: wire.Query, limits: Limits, prefix: str
) -> tuple[bytes | None, str | None, tuple[float, ...] | None, str | None]:
    """Inline bytes, digest, embedding and its release: exactly one source is set."""
    source = query.WhichOneof("source")
    if source == "inline_image":
        field = f"{prefix}query.inline_image"
        if len(query.inline_image) > MAX_INLINE_BYTES:
            raise ImageTooLarge(
                field, f"{len(query.inline_image)} bytes are over {MAX_INLINE_BYTES}; use UploadImage",
                limit=MAX_INLINE_BYTES,
            )  # fmt: skip
        sniff(query.inline_image, limits.max_image_bytes, limits.max_image_pixels, field)
        return query.inline_image, None, None, None
    if source == "image":
        field = f"{prefix}query.image"
        owner, sha256 = names.parse_image(query.image, field)
        if owner != project_id:
            raise InvalidRequest(field, f"must be an image of {names.project(project_id)}")
        return None, sha256, None, None
    if source == "embedding":
        return None, None, *_embedding(query.embedding, model_id, f"{prefix}query.embedding")
    raise InvalidRequest(f"{prefix}query", "needs one of inline_image, image and embedding")


def _embedding(embedding: wire.Embedding, model_id: str, field: str) -> tuple[tuple[float, ...], str]:
    values = tuple(embedding.values)
    if not 1 <= len(values) <= MAX_EMBEDDING_DIM:
        raise InvalidRequest(f"{field}.values", f"needs 1 to {MAX_EMBEDDING_DIM} values", values=len(values))
    if not all(map(math.isfinite, values)):
        raise InvalidRequest(f"{field}.values", "must be finite")
    if not any(values):
        raise InvalidRequest(f"{field}.values", "must not be all zero")
    owner, release_id = names.parse_release(embedding.release, f"{field}.release")
    if owner != model_id:
        raise InvalidRequest(f"{field}.release", f"must be a release of {names.model(model_id)}")
    return values, release_id


def _ttl(options: wire.JobOptions, limits: Limits, field: str) -> float:
    if not options.HasField("ttl"):
        return limits.default_ttl_s
    seconds: float = options.ttl.seconds + options.ttl.nanos / 1e9
    if not 1.0 <= seconds <= MAX_TTL_S:
        raise InvalidRequest(field, f"must be 1 s to {MAX_TTL_S:.0f} s", value=seconds)
    return seconds


def _request_id(value: str, field: str) -> str:
    if not value:
        return str(uuid.uuid4())
    try:
        return str(uuid.UUID(value))
    except ValueError as error:
        raise InvalidRequest(field, "must be a UUID", value=value[:80]) from error
