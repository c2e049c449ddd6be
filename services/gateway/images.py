"""Images on their way in and out: streamed, counted while they stream, and only ever sniffed.

Why it exists: an upload must be refused at the first byte over the limit, not after it filled the memory, and
what is stored must be what the client meant to send. A stream that breaks leaves what arrived for the next one.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

from sqlalchemy import Connection, text

from attribution.v1 import attribution_service_pb2 as wire
from byline.catalog.blobs import sha256_hex
from byline.catalog.sniff import sniff
from byline.db.session import single_statements
from byline.errors import ImageTooLarge, InvalidRequest
from services.gateway import names
from services.gateway.context import GatewayContext
from services.gateway.requests import Limits

CHUNK_BYTES = 256 * 1024
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NOTE = text("INSERT INTO uploads (project_id, sha256) VALUES (:project, :sha256) ON CONFLICT (project_id, sha256)"
             " DO UPDATE SET created_at = now()")  # fmt: skip
_OWNED = text(
    "SELECT EXISTS (SELECT 1 FROM uploads WHERE project_id = :project AND sha256 = :sha256)"
    " OR EXISTS (SELECT 1 FROM jobs WHERE image_sha256 = :sha256 AND project_id = :project)"
)


async def upload(context: GatewayContext, messages: AsyncIterator[wire.UploadImageRequest]) -> wire.Image:
    """Store the image of an upload stream for its project.

    ImageTooLarge as soon as the limit is passed; InvalidRequest if the stream is out of order, or size, digest or
    offset are not what its metadata said; ImageUndecodable, UnsupportedMediaType.
    """
    first = await anext(messages, None)
    if first is None or first.WhichOneof("payload") != "metadata":
        raise InvalidRequest("metadata", "must be the first message")
    metadata, limit = first.metadata, context.limits.max_image_bytes
    project_id = names.parse_project(metadata.parent, "metadata.parent")
    sha256 = _claimed(metadata)
    _check_size(metadata.size_bytes, limit, "metadata.size_bytes")
    data = bytearray(await context.offload(_begun, context, project_id, metadata, sha256))
    resumable = bool(sha256 and metadata.size_bytes)
    try:
        async for message in messages:
            if message.WhichOneof("payload") != "chunk":
                raise InvalidRequest("chunk", "must be in every message but the first")
            _check_size(len(data) + len(message.chunk), limit, "chunk")
            data += message.chunk
    finally:  # also when the client went away: this runs within the cancelled call, and must not wait
        if resumable and 0 < len(data) < metadata.size_bytes:
            context.uploads.keep(project_id, sha256, bytes(data))
    return await context.offload(_finish, context, project_id, metadata, sha256, bytes(data))


def state_of_upload(context: GatewayContext, project_id: str, sha256: str) -> wire.ImageUpload:
    """How much of an image the project has sent."""
    found = wire.ImageUpload(name=names.image(project_id, sha256))
    with single_statements(context.engine) as connection:
        owned = is_owned(connection, project_id, sha256)
    if owned and context.blobs.exists(sha256):
        data = context.blobs.get(sha256)
        found.image.CopyFrom(describe(project_id, data, context.limits))
        found.committed_bytes = len(data)
    else:
        found.committed_bytes = context.uploads.committed(project_id, sha256)
    return found


def is_owned(connection: Connection, project_id: str, sha256: str) -> bool:
    """Whether the project has uploaded this image or asked about it: another's image does not exist for it."""
    return bool(connection.execute(_OWNED, {"project": project_id, "sha256": sha256}).scalar_one())


def describe(project_id: str, data: bytes, limits: Limits) -> wire.Image:
    """The resource of stored bytes. ImageUndecodable, UnsupportedMediaType, ImageTooLarge."""
    header = sniff(data, limits.max_image_bytes, limits.max_image_pixels, "chunk")
    return wire.Image(
        name=names.image(project_id, sha256_hex(data)), media_type=header.media_type, size_bytes=len(data),
        width=header.width, height=header.height,
    )  # fmt: skip


def _claimed(metadata: wire.UploadImageRequest.Metadata) -> str:
    sha256 = metadata.sha256.lower()
    if sha256 and not _DIGEST.fullmatch(sha256):
        raise InvalidRequest("metadata.sha256", "must be 64 hexadecimal digits", value=metadata.sha256[:80])
    if metadata.offset < 0 or (metadata.offset and not (sha256 and metadata.size_bytes)):
        raise InvalidRequest("metadata.offset", "needs size_bytes and sha256, and must not be negative")
    if metadata.offset > metadata.size_bytes:
        raise InvalidRequest("metadata.offset", "is beyond the end of the file", value=metadata.offset)
    return sha256


def _begun(
    context: GatewayContext, project_id: str, metadata: wire.UploadImageRequest.Metadata, sha256: str
) -> bytes:
    """What was sent before, up to the offset."""
    if not metadata.offset:
        return b""
    kept = context.uploads.prefix(project_id, sha256, metadata.offset)
    if kept is None:
        there = context.uploads.committed(project_id, sha256)
        raise InvalidRequest(
            "metadata.offset", f"{there} bytes of this upload are kept: go on there (GetImageUpload)", committed=there
        )
    return kept


def _finish(
    context: GatewayContext, project_id: str, metadata: wire.UploadImageRequest.Metadata, sha256: str, image: bytes
) -> wire.Image:
    if metadata.size_bytes and metadata.size_bytes != len(image):
        raise InvalidRequest("metadata.size_bytes", "is not the number of bytes sent", received=len(image))
    found = sha256_hex(image)
    if sha256:
        context.uploads.forget(project_id, sha256)
        if sha256 != found:
            raise InvalidRequest("metadata.sha256", "is not the digest of the bytes sent", received=found)
    described = describe(project_id, image, context.limits)
    context.blobs.put(image)
    with single_statements(context.engine) as connection:
        connection.execute(_NOTE, {"project": project_id, "sha256": found})
    return described


def _check_size(size: int, limit: int, field: str) -> None:
    if size < 0:
        raise InvalidRequest(field, "must not be negative")
    if size > limit:
        raise ImageTooLarge(field, f"{size} bytes are over the limit of {limit}", limit=limit)
