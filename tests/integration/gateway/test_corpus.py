"""Adding and withdrawing over the API: outcomes item by item, copies, standing withdrawals, receipts."""

from __future__ import annotations

import io
import threading
import time

import grpc
import numpy as np
import pytest
from PIL import Image

from attribution.v1 import catalog_service_pb2 as wire
from attribution.v1 import catalog_service_pb2_grpc as catalog_rpc
from byline.client.corpus import CorpusClient, NewItem
from byline.errors import CorpusNotFound, InvalidRequest, ItemNotFound, ReceiptNotFound
from byline.releases.delta import DeltaStore
from services.gateway.additions import Adder

from .conftest import DIM, MODEL, Running
from .test_call_metrics import count
from .test_jobs import reason


def picture(seed: int, size: tuple[int, int] = (48, 48), quality: int | None = None) -> bytes:
    """Coloured squares, the same for a seed whatever its size; JPEG where a quality is given."""
    cells = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(cells).resize(size, Image.Resampling.NEAREST)
    out = io.BytesIO()
    image.save(out, "PNG") if quality is None else image.save(out, "JPEG", quality=quality)
    return out.getvalue()


@pytest.fixture
def corpus(running: Running):
    with CorpusClient(running.address, "p", timeout=30) as client:
        yield client


def test_each_item_has_an_outcome_of_its_own(corpus: CorpusClient, running: Running):
    good = NewItem(picture(1), "a cat", creator="ann", licence="CC0", keywords=("pet",))
    added = corpus.add_items(MODEL, [
        good, NewItem(b"no picture", "broken"), NewItem(picture(2), ""), NewItem(picture(1), "twice"),
        NewItem(picture(3), "taken", item_id=101), NewItem(picture(4), "by", creator="x" * 501),
    ])  # fmt: skip
    assert [one.outcome for one in added.items] == ["ADDED", *["REFUSED"] * 5]
    assert all(one.reason for one in added.items[1:])
    again = corpus.add_items(MODEL, [good])
    assert [one.outcome for one in again.items] == ["UNCHANGED"]
    found = corpus.corpus(MODEL)
    assert found.sequence >= added.corpus_sequence > 0
    image = corpus.item_image(f"corpora/{MODEL}/items/{added.items[0].item_id}")
    assert image == good.image
    with pytest.raises(CorpusNotFound):
        corpus.add_items("nowhere", [good])


def test_slow_additions_hold_up_nobody_else_and_one_whose_caller_has_gone_adds_nothing(
    corpus: CorpusClient, running: Running, monkeypatch: pytest.MonkeyPatch
):
    go, opening = threading.Event(), threading.Semaphore(0)
    look = Adder._look

    def slowly(self: Adder, image: bytes):
        opening.release()
        assert go.wait(60)
        return look(self, image)

    monkeypatch.setattr(Adder, "_look", slowly)
    ended = sum(count("CatalogService/AddItems", code) for code in ("CANCELLED", "DEADLINE_EXCEEDED"))
    with grpc.insecure_channel(running.address) as channel:
        add = catalog_rpc.CatalogServiceStub(channel).AddItems

        def adding(seed: int, timeout: float = 60):
            items = [wire.NewItem(image=picture(seed), caption=f"slow {seed}")]
            return add.future(wire.AddItemsRequest(parent=f"corpora/{MODEL}", items=items), timeout=timeout)

        given_up = adding(31, timeout=2)
        assert opening.acquire(timeout=30)
        others = [adding(seed) for seed in range(32, 36)]
        _until(lambda: any(call.done() for call in others))
        (refused,) = [call for call in others if call.done()]
        assert reason(refused.exception()) == "SERVER_BUSY"
        for _ in range(32):
            assert corpus.corpus(MODEL).name
        assert given_up.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        _until(lambda: sum(count("CatalogService/AddItems", c) for c in ("CANCELLED", "DEADLINE_EXCEEDED")) > ended)
        go.set()
        kept = [call.result(60).results[0].item_id for call in others if call is not refused]
    added = {item.item_id for item in running.context.catalog.items(MODEL) if item.caption.startswith("slow")}
    assert added == set(kept) and len(added) == 3


def _until(holds) -> None:
    until = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_copy_joins_the_group_of_the_original_whatever_it_claims(corpus: CorpusClient):
    added = corpus.add_items(MODEL, [
        NewItem(picture(5), "original"), NewItem(picture(5, (90, 90)), "scaled"), NewItem(picture(6), "other"),
    ])  # fmt: skip
    later = corpus.add_items(MODEL, [NewItem(picture(5, quality=60), "saved again")])
    original, scaled, other = added.items
    assert scaled.near_duplicate_group == later.items[0].near_duplicate_group == original.item_id
    assert other.near_duplicate_group == other.item_id


def test_what_a_creator_withdrew_is_gone_and_stays_out(corpus: CorpusClient, running: Running):
    mine = [NewItem(picture(seed), f"of zoe {seed}", creator="zoe") for seed in (11, 12)]
    added = corpus.add_items(MODEL, [*mine, NewItem(picture(13), "of ann", creator="ann")])
    receipt = corpus.withdraw_all(MODEL, creator="zoe", reason="she asked")
    ids = {one.item_id for one in added.items[:2]}
    assert set(receipt.withdrawn) == ids
    for item_id in ids:
        with pytest.raises(ItemNotFound):
            corpus.item_image(f"corpora/{MODEL}/items/{item_id}")
    refused = corpus.add_items(MODEL, [
        mine[0], NewItem(picture(14), "a new one", creator="zoe"), NewItem(picture(12), "under another name"),
    ])  # fmt: skip
    assert [one.outcome for one in refused.items] == ["REFUSED"] * 3
    kept = corpus.receipt(receipt.name)
    assert (kept.creator, kept.reason, set(kept.withdrawn)) == ("zoe", "she asked", ids)
    assert kept.purge_time is None
    with pytest.raises(ReceiptNotFound):
        corpus.receipt(f"corpora/{MODEL}/withdrawals/00000000-0000-0000-0000-000000000000")


def test_a_withdrawal_names_exactly_one_criterion(corpus: CorpusClient):
    with pytest.raises(InvalidRequest):
        corpus.withdraw_all(MODEL)
    with pytest.raises(InvalidRequest):
        corpus.withdraw_all(MODEL, creator="a", licence="b")


def test_the_corpus_tells_how_far_its_additions_are_found(served: Running, corpus: CorpusClient):
    added = corpus.add_items(MODEL, [NewItem(picture(21), "new")])
    (coverage,) = corpus.corpus(MODEL).coverages
    assert coverage.corpus_sequence is None
    DeltaStore(served.context.engine).add(
        "r1", [added.items[0].item_id], np.ones((1, DIM), np.float32), added.corpus_sequence
    )
    found = corpus.wait_until_found(MODEL, added.corpus_sequence, timeout=5)
    assert found.coverages[0].delta_items == 1
