"""The client of whoever keeps a corpus: add items, wait until they are found, withdraw, read a receipt.

Why it exists: these calls change what everybody is answered, so they do not stand among the calls of a platform; and a
thousand pictures do not fit into one message, so somebody must cut them into requests.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from attribution.v1 import catalog_service_pb2 as wire
from byline.client.calls import Call
from byline.client.sync import Client
from byline.errors import CallTimedOut

_SERVICE = "CatalogService"
#: Of one request: the server takes 256 items and 4 MiB.
_ITEMS, _BYTES = 64, 3 * 1024 * 1024
_OUTCOME = wire.AddItemsResponse.Result.Outcome


@dataclass(frozen=True, slots=True)
class NewItem:
    """One item to add. ``item_id`` 0: one is derived from corpus and image."""

    image: bytes
    caption: str
    creator: str = ""
    licence: str = ""
    source: str = ""
    source_path: str = ""
    keywords: tuple[str, ...] = ()
    item_id: int = 0


@dataclass(frozen=True, slots=True)
class AddedItem:
    """What became of an item: ADDED, UNCHANGED or REFUSED (``reason`` says why)."""

    outcome: str
    item_id: int
    near_duplicate_group: int
    reason: str


@dataclass(frozen=True, slots=True)
class Additions:
    """What became of all of them, in order. An answer of this ``corpus_sequence`` or a higher one has seen them."""

    items: tuple[AddedItem, ...]
    corpus_sequence: int

    def count(self, outcome: str) -> int:
        """How many came out like that."""
        return sum(item.outcome == outcome for item in self.items)


@dataclass(frozen=True, slots=True)
class Coverage:
    """What of a corpus one model's answers include; ``corpus_sequence`` None while nobody has looked."""

    model: str
    release: str
    delta_sequence: int
    delta_items: int
    corpus_sequence: int | None


@dataclass(frozen=True, slots=True)
class Corpus:
    """A corpus in figures."""

    name: str
    items: int
    withdrawn: int
    creators: int
    sequence: int
    coverages: tuple[Coverage, ...] = ()


@dataclass(frozen=True, slots=True)
class Receipt:
    """A kept receipt. ``purge_time``: since when the items are in no file; ``absent_releases`` were made without."""

    name: str
    withdrawn: tuple[int, ...]
    already_withdrawn: tuple[int, ...]
    unknown: tuple[int, ...]
    creator: str
    licence: str
    reason: str
    effective_time: datetime | None
    purge_time: datetime | None
    absent_releases: tuple[str, ...] = field(default=())


class CorpusClient(Client):
    """A ``Client`` that can change a corpus, too."""

    def add_items(self, corpus: str, items: Iterable[NewItem]) -> Additions:
        """Add items; what is refused is told item by item. Interrupted, it may simply be repeated."""
        found: list[AddedItem] = []
        sequence = 0
        for part in _parts(items):
            request = wire.AddItemsRequest(parent=f"corpora/{corpus}", items=part)
            response = self._do(Call(_SERVICE, "AddItems", request, lambda message: message))
            found += [_added(result) for result in response.results]
            sequence = response.corpus_sequence
        return Additions(tuple(found), sequence)

    def corpus(self, corpus: str) -> Corpus:
        """A corpus in figures, and what of it is found."""
        return self._do(Call(_SERVICE, "GetCorpus", wire.GetCorpusRequest(name=f"corpora/{corpus}"), _corpus))

    def wait_until_found(self, corpus: str, sequence: int, timeout: float = 60.0, poll_s: float = 0.1) -> Corpus:
        """Return once the answers of all models that have a release include additions up to ``sequence``.

        CallTimedOut after ``timeout`` seconds: they will be found later.
        """
        ends = time.monotonic() + timeout
        while True:
            now = self.corpus(corpus)
            serving = [one for one in now.coverages if one.release]
            if all(one.corpus_sequence is not None and one.corpus_sequence >= sequence for one in serving):
                return now
            if time.monotonic() >= ends:
                raise CallTimedOut(f"additions up to {sequence} are not all found after {timeout:g} s", corpus=corpus)
            time.sleep(poll_s)

    def withdraw_all(self, corpus: str, *, creator: str = "", licence: str = "", reason: str = "") -> Receipt:
        """Withdraw all items of a creator, or under a licence, and refuse what is added under it later."""
        request = wire.WithdrawItemsRequest(
            parent=f"corpora/{corpus}", creator=creator, licence=licence, reason=reason
        )
        return self._do(Call(_SERVICE, "WithdrawItems", request, _receipt))

    def withdraw_items(self, corpus: str, item_ids: Sequence[int], reason: str = "") -> Receipt:
        """As ``withdraw``, with the name under which the receipt is kept."""
        request = wire.WithdrawItemsRequest(parent=f"corpora/{corpus}", item_ids=item_ids, reason=reason)
        return self._do(Call(_SERVICE, "WithdrawItems", request, _receipt))

    def receipt(self, name: str) -> Receipt:
        """A kept receipt, by name. ReceiptNotFound."""
        return self._do(Call(_SERVICE, "GetWithdrawal", wire.GetWithdrawalRequest(name=name), _receipt))


def _parts(items: Iterable[NewItem]) -> Iterator[list[wire.NewItem]]:
    part: list[wire.NewItem] = []
    size = 0
    for item in items:
        message = wire.NewItem(
            image=item.image, caption=item.caption, keywords=item.keywords, creator=item.creator, licence=item.licence,
            source=item.source, source_path=item.source_path, item_id=item.item_id,
        )  # fmt: skip
        if part and (len(part) == _ITEMS or size + message.ByteSize() > _BYTES):
            yield part
            part, size = [], 0
        part.append(message)
        size += message.ByteSize()
    if part:
        yield part


def _added(result: wire.AddItemsResponse.Result) -> AddedItem:
    name = _OUTCOME.Name(result.outcome).removeprefix("OUTCOME_")
    return AddedItem(name, result.item_id, result.near_duplicate_group, result.reason)


def _corpus(message: wire.Corpus) -> Corpus:
    coverages = tuple(
        Coverage(
            one.model, one.release, one.delta_sequence, one.delta_items,
            one.corpus_sequence if one.HasField("corpus_sequence") else None,
        )
        for one in message.coverages
    )  # fmt: skip
    return Corpus(
        message.name, message.items, message.withdrawn_items, message.creators, message.sequence, coverages
    )


def _receipt(message: wire.WithdrawalReceipt) -> Receipt:
    return Receipt(
        message.name, tuple(message.withdrawn_item_ids), tuple(message.already_withdrawn_item_ids),
        tuple(message.unknown_item_ids), message.creator, message.licence, message.reason,
        message.effective_time.ToDatetime(UTC) if message.HasField("effective_time") else None,
        message.purge_time.ToDatetime(UTC) if message.HasField("purge_time") else None,
        tuple(message.absent_releases),
    )  # fmt: skip
