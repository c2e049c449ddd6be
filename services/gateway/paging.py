"""The size of a page, the same for every listing.

Why it exists: a client may ask for any size; what it gets is bounded in one place.
"""

from __future__ import annotations

from byline.errors import InvalidRequest

MAX_PAGE = 1_000
DEFAULT_PAGE = 50


def page_size(asked: int) -> int:
    """The size of a page: default 50, at most 1,000. InvalidRequest for a negative one."""
    if asked < 0:
        raise InvalidRequest("page_size", "must not be negative", value=asked)
    return min(asked or DEFAULT_PAGE, MAX_PAGE)
