"""CatalogService: models, items, their images and their withdrawal.

Why it exists: the handlers, and nothing but the handlers. A withdrawn item does not exist for callers.
"""

# ruff: noqa: N802 - the methods have the names the protos give them.

from __future__ import annotations

import threading
import uuid
from collections.abc import Sequence
from typing import Any

from attribution.v1 import catalog_service_pb2 as wire
from attribution.v1 import catalog_service_pb2_grpc as rpc
from byline.catalog.items import Item
from byline.catalog.sniff import sniff
from byline.catalog.store import CorpusSummary
from byline.catalog.withdrawals import Criterion
from byline.errors import CorpusNotFound, InvalidRequest, ItemNotFound, ReceiptNotFound, ServerBusy
from byline.releases.delta import DeltaStore
from byline.security.scopes import current_principal
from services.gateway import convert, names
from services.gateway.additions import Adder
from services.gateway.context import GatewayContext

MAX_READ = 1_000
MAX_WITHDRAW = 10_000
#: AddItems calls at a time: their pictures are opened one after the other, and more would only time out.
MAX_ADDING = 4


class CatalogServicer(rpc.CatalogServiceServicer):
    """The handlers of CatalogService."""

    def __init__(self, context: GatewayContext) -> None:
        self._context = context
        self._adder = Adder(context.catalog, context.blobs)
        self._adding = 0
        self._deltas = DeltaStore(context.engine)

    async def ListModels(self, request: wire.ListModelsRequest, context: Any) -> wire.ListModelsResponse:
        """All models."""
        records = await self._context.offload(self._context.catalog.models)
        return wire.ListModelsResponse(models=[convert.model(record) for record in records])

    async def BatchGetItems(self, request: wire.BatchGetItemsRequest, context: Any) -> wire.BatchGetItemsResponse:
        """Items by id, in the order asked for."""
        corpus_id = names.parse_corpus(request.parent)
        _check_count(request.item_ids, MAX_READ)
        items = await self._context.offload(self._visible, corpus_id, list(request.item_ids))
        return wire.BatchGetItemsResponse(items=[convert.item(item, corpus_id) for item in items])

    async def GetItemImage(self, request: wire.GetItemImageRequest, context: Any) -> wire.ItemImage:
        """The image file of one item."""
        corpus_id, item_id = names.parse_item(request.name)
        return await self._context.offload(self._image, corpus_id, item_id)

    async def AddItems(self, request: wire.AddItemsRequest, context: Any) -> wire.AddItemsResponse:
        """Add items; each has an outcome of its own."""
        corpus_id = names.parse_corpus(request.parent)
        if self._adding >= MAX_ADDING:
            raise ServerBusy(f"{MAX_ADDING} calls add items already; try again in a second")
        over = threading.Event()
        self._adding += 1
        try:
            return await self._context.offload_pictures(self._adder.add, corpus_id, request.items, over.is_set)
        finally:
            self._adding -= 1
            over.set()

    async def GetCorpus(self, request: wire.GetCorpusRequest, context: Any) -> wire.Corpus:
        """A corpus in figures, and what of it is found."""
        corpus_id = names.parse_corpus(request.name, "name")
        return await self._context.offload(self._corpus, corpus_id)

    async def GetWithdrawal(self, request: wire.GetWithdrawalRequest, context: Any) -> wire.WithdrawalReceipt:
        """The receipt of a withdrawal."""
        corpus_id, receipt_id = names.parse_withdrawal(request.name)
        return await self._context.offload(self._receipt, corpus_id, receipt_id)

    async def WithdrawItems(self, request: wire.WithdrawItemsRequest, context: Any) -> wire.WithdrawalReceipt:
        """Withdraw items of a corpus; the receipt comes after the commit."""
        corpus_id = names.parse_corpus(request.parent)
        criterion = Criterion(tuple(sorted(set(request.item_ids))), request.creator.strip(), request.licence.strip())
        if criterion.item_ids:
            _check_count(request.item_ids, MAX_WITHDRAW)
        return await self._context.offload(self._withdraw, corpus_id, criterion, request.reason)

    def _visible(self, corpus_id: str, item_ids: Sequence[int]) -> list[Item]:
        catalog = self._context.catalog
        known = catalog.known(corpus_id, item_ids)
        found = catalog.by_ids(item_id for item_id in item_ids if known.get(item_id) is not None)
        withdrawn = catalog.withdrawn(corpus_id)
        return [found[item_id] for item_id in item_ids if item_id in found and item_id not in withdrawn]

    def _image(self, corpus_id: str, item_id: int) -> wire.ItemImage:
        items = self._visible(corpus_id, [item_id])
        if not items:
            raise ItemNotFound(f"corpus {corpus_id} has no item {item_id}", corpus=corpus_id, item=item_id)
        data = self._context.blobs.get(items[0].image_sha256)
        limits = self._context.limits
        header = sniff(data, limits.max_image_bytes, limits.max_image_pixels)
        return wire.ItemImage(media_type=header.media_type, data=data)

    def _withdraw(self, corpus_id: str, criterion: Criterion, reason: str) -> wire.WithdrawalReceipt:
        catalog = self._context.catalog
        principal = current_principal().name
        if not criterion.item_ids:
            self._known_corpus(corpus_id)
            receipt = catalog.withdraw_matching(corpus_id, criterion, principal, reason=reason)
            own: Sequence[int] = ()
        else:
            known = catalog.known(corpus_id, criterion.item_ids)
            own = [item_id for item_id in criterion.item_ids if known.get(item_id) is not None]
            receipt = catalog.withdraw(own, principal, reason=reason)
        return wire.WithdrawalReceipt(
            corpus=names.corpus(corpus_id),
            withdrawn_item_ids=sorted(receipt.withdrawn),
            already_withdrawn_item_ids=sorted(receipt.already),
            unknown_item_ids=sorted({*receipt.unknown, *criterion.item_ids} - set(own)),
            effective_time=convert.timestamp(receipt.at),
            name=names.withdrawal(corpus_id, receipt.receipts[0]) if receipt.receipts else "",
            creator=criterion.creator,
            licence=criterion.licence,
            reason=reason,
        )

    def _receipt(self, corpus_id: str, receipt_id: uuid.UUID) -> wire.WithdrawalReceipt:
        kept = self._context.catalog.receipt(receipt_id)
        if kept.corpus_id != corpus_id:
            raise ReceiptNotFound(f"corpus {corpus_id} has no withdrawal {receipt_id}", receipt=receipt_id)
        return wire.WithdrawalReceipt(
            corpus=names.corpus(corpus_id),
            withdrawn_item_ids=sorted(set(kept.images) - kept.already),
            already_withdrawn_item_ids=sorted(kept.already),
            effective_time=convert.timestamp(kept.at),
            name=names.withdrawal(corpus_id, receipt_id),
            creator=str(kept.criterion.get("creator", "")),
            licence=str(kept.criterion.get("licence", "")),
            reason=kept.reason,
            purge_time=convert.timestamp(kept.purged_at),
            absent_releases=[
                names.release(str(model_id), str(release_id))
                for model_id, release_id in kept.purged.get("absent_from", ())
            ],
        )

    def _known_corpus(self, corpus_id: str) -> CorpusSummary:
        for summary in self._context.catalog.corpora():
            if summary.corpus_id == corpus_id:
                return summary
        raise CorpusNotFound(f"there is no corpus {corpus_id}", corpus=corpus_id)

    def _corpus(self, corpus_id: str) -> wire.Corpus:
        summary = self._known_corpus(corpus_id)
        coverages = []
        for model in self._context.catalog.models():
            if model.corpus_id != corpus_id:
                continue
            active = self._context.registry.active(model.model_id)
            coverage = wire.Corpus.Coverage(model=names.model(model.model_id))
            if active is not None:
                delta = self._deltas.state(active.release_id)
                coverage.release = names.release(model.model_id, active.release_id)
                coverage.delta_sequence, coverage.delta_items = delta.sequence, delta.items
                if delta.corpus_sequence >= 0:
                    coverage.corpus_sequence = delta.corpus_sequence
            coverages.append(coverage)
        return wire.Corpus(
            name=names.corpus(corpus_id), items=summary.items, withdrawn_items=summary.withdrawn,
            creators=summary.creators, sequence=self._context.catalog.sequence(corpus_id), coverages=coverages,
        )  # fmt: skip


def _check_count(item_ids: Sequence[int], limit: int) -> None:
    if not 1 <= len(item_ids) <= limit:
        raise InvalidRequest("item_ids", f"needs 1 to {limit} ids", value=len(item_ids))
