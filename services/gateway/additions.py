"""AddItems: checked, decoded by a child, stored, and told apart item by item.

Why it exists: one broken picture must not refuse two hundred good ones, so every item has an outcome of its own. The
order is that of every write here: bytes first, then the row that names them. Opening pictures takes longer than all
else the gateway does, so work whose caller has gone is dropped while nothing of it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attribution.v1 import catalog_service_pb2 as wire
from byline.catalog.blobs import BlobStore, sha256_hex
from byline.catalog.items import Item, derive_item_id
from byline.catalog.look import Look, look_of
from byline.catalog.store import CatalogStore
from byline.errors import CallTimedOut, CorpusNotFound, ImageTooLarge, ImageUndecodable, InvalidRequest
from byline.security.decoding import decode_untrusted

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_ITEMS = 256
MAX_CAPTION = 4_000
MAX_KEYWORDS = 64
MAX_FIELD = 500
Result = wire.AddItemsResponse.Result


@dataclass(frozen=True)
class _Read:
    item: Item
    image: bytes
    place: int


class Adder:
    """Adds items to corpora. ``decode`` opens pictures of strangers. For any number of threads."""

    def __init__(
        self, catalog: CatalogStore, blobs: BlobStore, decode: Callable[[bytes], Image] = decode_untrusted
    ) -> None:
        self._catalog = catalog
        self._blobs = blobs
        self._decode = decode

    def add(
        self, corpus_id: str, new: Sequence[wire.NewItem], over: Callable[[], bool] = lambda: False
    ) -> wire.AddItemsResponse:
        """Add what can be added. CorpusNotFound; InvalidRequest for a request as a whole.

        CallTimedOut, with nothing added, once ``over`` says that nobody waits for the answer any more.
        """
        if not 1 <= len(new) <= MAX_ITEMS:
            raise InvalidRequest("items", f"needs 1 to {MAX_ITEMS} items", value=len(new))
        if all(summary.corpus_id != corpus_id for summary in self._catalog.corpora()):
            raise CorpusNotFound(f"there is no corpus {corpus_id}", corpus=corpus_id)
        results = [Result() for _ in new]
        read: dict[int, _Read] = {}
        for place, one in enumerate(new):
            item, reason = _item(corpus_id, one)
            if item is not None and item.item_id in read:
                item, reason = None, "the same item is in this request twice"
            if item is None:
                results[place] = Result(outcome=Result.OUTCOME_REFUSED, reason=reason)
            else:
                read[item.item_id] = _Read(item, one.image, place)
        sequence = self._add(corpus_id, read, results, over) if read else self._catalog.sequence(corpus_id)
        return wire.AddItemsResponse(results=results, corpus_sequence=sequence)

    def _add(self, corpus_id: str, read: dict[int, _Read], results: list[Result], over: Callable[[], bool]) -> int:
        known = self._catalog.known(corpus_id, list(read))
        refused = self._catalog.refusals(corpus_id, [one.item for one in read.values()])
        fresh, looks = [], {}
        for item_id, one in read.items():
            if item_id in refused:
                results[one.place] = _refused(item_id, refused[item_id])
            elif known.get(item_id) == one.item.image_sha256:
                results[one.place] = Result(outcome=Result.OUTCOME_UNCHANGED, item_id=item_id)
            elif item_id in known:
                results[one.place] = _refused(item_id, f"id {item_id} belongs to another image already")
            else:
                _refuse_if(over)
                look, reason = self._look(one.image)
                if look is None:
                    results[one.place] = _refused(0, reason)
                else:
                    looks[item_id] = look
                    fresh.append(one)
        _refuse_if(over)
        self._blobs.put_many([one.image for one in fresh])
        _refuse_if(over)
        inserted = self._catalog.add_items(corpus_id, [one.item for one in fresh], looks)
        for one in fresh:
            item_id = one.item.item_id
            if item_id in inserted.added:
                group = inserted.groups[item_id]
                added = Result(outcome=Result.OUTCOME_ADDED, item_id=item_id, near_duplicate_group=group)
                results[one.place] = added
            elif item_id in inserted.refused:
                results[one.place] = _refused(item_id, inserted.refused[item_id])
            elif item_id in inserted.conflicting:
                results[one.place] = _refused(item_id, f"id {item_id} belongs to another image already")
            else:
                results[one.place] = Result(outcome=Result.OUTCOME_UNCHANGED, item_id=item_id)
        return inserted.sequence or self._catalog.sequence(corpus_id)

    def _look(self, image: bytes) -> tuple[Look | None, str]:
        try:
            return look_of(self._decode(image)), ""
        except (ImageUndecodable, ImageTooLarge) as error:
            return None, error.message


def _refuse_if(over: Callable[[], bool]) -> None:
    if over():
        raise CallTimedOut("the call ended before its items were added: send fewer at a time")


def _refused(item_id: int, reason: str) -> Result:
    return Result(outcome=Result.OUTCOME_REFUSED, item_id=item_id, reason=reason)


def _item(corpus_id: str, new: wire.NewItem) -> tuple[Item | None, str]:
    """The item, or why there is none. Its group is not for the caller to say: it follows from the picture."""
    caption = new.caption.strip()
    texts = (caption, new.creator, new.licence, new.source, new.source_path, *new.keywords)
    if not new.image:
        return None, "it has no image"
    if not caption or len(caption) > MAX_CAPTION:
        return None, f"its caption must have 1 to {MAX_CAPTION} characters"
    if any("\x00" in text for text in texts) or max(map(len, texts[1:])) > MAX_FIELD:
        return None, f"a field is longer than {MAX_FIELD} characters, or holds NUL characters"
    if len(new.keywords) > MAX_KEYWORDS:
        return None, f"it has more than {MAX_KEYWORDS} keywords"
    if new.item_id < 0:
        return None, "its item_id must be 1 to 2^63-1, or 0 for one that is derived"
    digest = sha256_hex(new.image)
    item = Item(
        item_id=new.item_id or derive_item_id(corpus_id, digest), caption=caption, keywords=tuple(new.keywords),
        creator=new.creator.strip(), licence=new.licence.strip(), source=new.source.strip(),
        source_path=new.source_path.strip(), image_sha256=digest,
    )  # fmt: skip
    return item, ""
