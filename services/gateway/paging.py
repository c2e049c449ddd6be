"""The size of a page, the same for every listing.

Why it exists: a client may ask for any size; what it gets is bounded in one place, by rows and by bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from byline.errors import InvalidRequest

MAX_PAGE = 1_000
DEFAULT_PAGE = 50
#: A gRPC client receives 4 MiB unless it is told to receive more.
RESPONSE_BYTES = 3 * 1024 * 1024

M = TypeVar("M", bound=Any)


def page_size(asked: int, default: int = DEFAULT_PAGE) -> int:
    """The size of a page: at most 1,000. InvalidRequest for a negative one."""
    if asked < 0:
        raise InvalidRequest("page_size", "must not be negative", value=asked)
    return min(asked or default, MAX_PAGE)


def fitting(messages: Iterable[M]) -> list[M]:
    """The first of some messages, as many as any client reads in one response; one at least. No more are made."""
    found: list[M] = []
    size = 0
    for message in messages:
        size += message.ByteSize()
        if found and size > RESPONSE_BYTES:
            break
        found.append(message)
    return found
