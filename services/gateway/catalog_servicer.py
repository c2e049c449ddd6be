"""CatalogService: models, items, their images and their withdrawal.

Why it exists: the handlers, and nothing but the handlers. A withdrawn item does not exist for callers.
"""

# ruff: noqa: N802 - the methods have the names the protos give them.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attribution.v1 import catalog_service_pb2 as wire
from attribution.v1 import catalog_service_pb2_grpc as rpc
from byline.catalog.items import Item
from byline.catalog.sniff import sniff
from byline.errors import InvalidRequest, ItemNotFound
from services.gateway import convert, names
from services.gateway.context import GatewayContext

MAX_READ = 1_000
MAX_WITHDRAW = 10_000


class CatalogServicer(rpc.CatalogServiceServicer):
    """The handlers of CatalogService."""

    def __init__(self, context: GatewayContext) -> None:
        self._context = context

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

    async def WithdrawItems(self, request: wire.WithdrawItemsRequest, context: Any) -> wire.WithdrawalReceipt:
        """Withdraw items of a corpus; the receipt comes after the commit."""
        corpus_id = names.parse_corpus(request.parent)
        _check_count(request.item_ids, MAX_WITHDRAW)
        return await self._context.offload(self._withdraw, corpus_id, sorted(set(request.item_ids)))

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

    def _withdraw(self, corpus_id: str, item_ids: Sequence[int]) -> wire.WithdrawalReceipt:
        known = self._context.catalog.known(corpus_id, item_ids)
        own = [item_id for item_id in item_ids if known.get(item_id) is not None]
        receipt = self._context.catalog.withdraw(own)
        return wire.WithdrawalReceipt(
            corpus=names.corpus(corpus_id),
            withdrawn_item_ids=sorted(receipt.withdrawn),
            already_withdrawn_item_ids=sorted(receipt.already),
            unknown_item_ids=sorted({*receipt.unknown, *item_ids} - set(own)),
            effective_time=convert.timestamp(receipt.at),
        )


def _check_count(item_ids: Sequence[int], limit: int) -> None:
    if not 1 <= len(item_ids) <= limit:
        raise InvalidRequest("item_ids", f"needs 1 to {limit} ids", value=len(item_ids))
