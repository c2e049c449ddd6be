"""Images on their way in and out: streamed, counted while they stream, and only ever sniffed.

Why it exists: an upload must be refused at the first byte over the limit, not after it filled the memory, and
what is stored must be what the client meant to send.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from attribution.v1 import attribution_service_pb2 as wire
from byline.catalog.blobs import sha256_hex
from byline.catalog.sniff import sniff
from byline.errors import ImageTooLarge, InvalidRequest
from services.gateway import names
from services.gateway.requests import Limits

CHUNK_BYTES = 256 * 1024


async def receive(messages: AsyncIterator[wire.UploadImageRequest], max_bytes: int) -> tuple[str, bytes]:
    """Project id and bytes of an upload. ImageTooLarge as soon as the limit is passed; InvalidRequest if the
    stream is out of order, or size or digest are not what its metadata said."""
    metadata: wire.UploadImageRequest.Metadata | None = None
    project_id = ""
    data = bytearray()
    async for message in messages:
        kind = message.WhichOneof("payload")
        if metadata is None:
            if kind != "metadata":
                raise InvalidRequest("metadata", "must be the first message")
            metadata = message.metadata
            project_id = names.parse_project(metadata.parent, "metadata.parent")
            _check_size(metadata.size_bytes, max_bytes, "metadata.size_bytes")
        elif kind != "chunk":
            raise InvalidRequest("chunk", "must be in every message but the first")
        else:
            _check_size(len(data) + len(message.chunk), max_bytes, "chunk")
            data += message.chunk
    if metadata is None:
        raise InvalidRequest("metadata", "must be the first message")
    if metadata.size_bytes and metadata.size_bytes != len(data):
        raise InvalidRequest("metadata.size_bytes", "is not the number of bytes sent", received=len(data))
    image = bytes(data)
    if metadata.sha256 and metadata.sha256.lower() != sha256_hex(image):
        raise InvalidRequest("metadata.sha256", "is not the digest of the bytes sent", received=sha256_hex(image))
    return project_id, image


def describe(project_id: str, data: bytes, limits: Limits) -> wire.Image:
    """The resource of stored bytes. ImageUndecodable, ImageTooLarge."""
    header = sniff(data, limits.max_image_bytes, limits.max_image_pixels, "chunk")
    return wire.Image(
        name=names.image(project_id, sha256_hex(data)), media_type=header.media_type, size_bytes=len(data),
        width=header.width, height=header.height,
    )  # fmt: skip


def _check_size(size: int, limit: int, field: str) -> None:
    if size < 0:
        raise InvalidRequest(field, "must not be negative")
    if size > limit:
        raise ImageTooLarge(field, f"{size} bytes are over the limit of {limit}", limit=limit)
