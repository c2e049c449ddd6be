"""Items and withdrawal on a real Postgres."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from byline.catalog.items import Item
from byline.catalog.store import CatalogStore, ModelRecord
from byline.db.listen import WITHDRAWALS, Listener
from byline.db.session import make_engine
from byline.errors import ModelNotFound, ModelNotUsable


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = make_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def store(engine: Engine) -> CatalogStore:
    store = CatalogStore(engine)
    store.add_corpus("clips")
    store.add_items("clips", [item(n) for n in range(1, 6)])
    return store


def item(number: int) -> Item:
    return Item(
        number, f"picture {number}", ("a", "b"), "Ada", "public domain", "here", f"{number}.png", f"{number:064x}", 1
    )


def test_items_come_back_as_they_were_added(store: CatalogStore) -> None:
    assert store.items("clips") == [item(n) for n in range(1, 6)]
    assert store.by_ids([3, 1, 99]) == {3: item(3), 1: item(1)}
    assert store.items("another") == []


def test_adding_again_changes_nothing_and_names_conflicts(store: CatalogStore) -> None:
    store.add_corpus("other")
    again = store.add_items("clips", [item(1), item(6)])
    assert (again.added, again.conflicting) == (frozenset({6}), frozenset())
    foreign = store.add_items("other", [item(2)])
    assert (foreign.added, foreign.conflicting) == (frozenset(), frozenset({2}))


def test_a_withdrawn_item_is_withdrawn_for_everybody_when_the_receipt_is_given(
    store: CatalogStore, engine: Engine
) -> None:
    receipt = store.withdraw([2, 4, 77], principal="ada")
    assert (receipt.withdrawn, receipt.already, receipt.unknown) == ((2, 4), (), (77,))
    assert CatalogStore(engine).withdrawn("clips") == {2, 4}
    assert [i.item_id for i in store.items("clips")] == [1, 3, 5]
    assert len(store.items("clips", include_withdrawn=True)) == 5
    assert store.by_ids([2])[2] == item(2)
    again = store.withdraw([2, 3])
    assert (again.withdrawn, again.already) == ((3,), (2,))
    with engine.connect() as connection:
        events = connection.execute(text("SELECT principal, detail FROM audit_events ORDER BY id")).all()
    assert (events[0].principal, events[0].detail["withdrawn"]) == ("ada", ["2", "4"])


def test_a_withdrawal_is_announced_when_it_is_committed(store: CatalogStore, database_url: str) -> None:
    heard, connected, stop = threading.Event(), threading.Event(), threading.Event()
    payloads: list[str] = []

    def on_event(channel: str, payload: str) -> None:
        payloads.append(payload)
        heard.set()

    listener = Listener(database_url, [WITHDRAWALS], stop, on_event, connected.set)
    listener.start()
    assert connected.wait(10)
    store.withdraw([1])
    assert heard.wait(10)
    stop.set()
    listener.join(10)
    assert payloads == ["clips"]


def test_concurrent_withdrawals_withdraw_each_item_once(store: CatalogStore) -> None:
    receipts = []
    start = threading.Barrier(4)

    def withdraw() -> None:
        start.wait(10)
        receipts.append(store.withdraw([5, 4, 3, 2, 1]))

    threads = [threading.Thread(target=withdraw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(i for receipt in receipts for i in receipt.withdrawn) == [1, 2, 3, 4, 5]


def test_a_model_keeps_its_corpus_and_revision(store: CatalogStore) -> None:
    model = ModelRecord("m", "clips", Path("/models/a"), "rev1")
    store.add_model(model)
    store.add_model(ModelRecord("m", "clips", Path("/models/b"), "rev1"))
    assert store.model("m").directory == Path("/models/b")
    assert [m.model_id for m in store.models()] == ["m"]
    with pytest.raises(ModelNotUsable):
        store.add_model(ModelRecord("m", "clips", Path("/models/b"), "rev2"))
    with pytest.raises(ModelNotFound):
        store.model("absent")


def test_a_corpus_is_summed_up(store: CatalogStore) -> None:
    store.withdraw([1])
    (summary,) = store.corpora()
    assert (summary.corpus_id, summary.items, summary.withdrawn, summary.creators) == ("clips", 5, 1, 1)
