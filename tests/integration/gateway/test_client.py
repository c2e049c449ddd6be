"""The Python client against a running gateway."""

from __future__ import annotations

import asyncio
import io
import random
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from byline.catalog.items import Item
from byline.client import AsyncClient, Client, Sketches
from byline.errors import (
    CallTimedOut,
    DatabaseUnavailable,
    InvalidRequest,
    JobNotFound,
    NoActiveRelease,
    ReleaseChanged,
    ServerUnreachable,
    TierNotAvailable,
)
from byline.jobs import Stage
from byline.releases.manifest import SketchSection

from .conftest import ITEMS, MODEL, AnsweringWorker, Running, answer, manifest, png


@pytest.fixture
def client(served: Running) -> Iterator[Client]:
    with Client(served.address, timeout=10.0) as client:
        yield client


def test_one_line_names_the_sources_whatever_form_the_image_has(
    client: Client, worker: AnsweringWorker, tmp_path: Path
) -> None:
    path = tmp_path / "cat.png"
    path.write_bytes(png())
    for image in (path, str(path), png(), Image.new("RGB", (8, 8), "red")):
        attribution = client.attribute(image, prompt="a cat", top_k=3)
        assert [influence.item_id for influence in attribution] == list(ITEMS[:3])
        assert attribution.tier == "RETRIEVED" and attribution.release.endswith("/r1")
        assert attribution.influences[0].tau is None and attribution.influences[0].creator == "ann"


def test_a_verified_answer_is_waited_for_and_the_retrieved_one_kept(client: Client, worker: AnsweringWorker) -> None:
    attribution = client.attribute(png(), tier="VERIFIED", top_k=4)
    assert attribution.tier == "VERIFIED" and attribution.influences[0].tau == pytest.approx(0.25)
    assert [a.tier for a in attribution.job.answers] == ["RETRIEVED", "VERIFIED"]
    retrieved = attribution.job.answer_of("RETRIEVED")
    assert retrieved is not None and retrieved.influences[0].tau is None


def test_an_estimate_is_answered_once_a_release_with_sketches_is_active(
    client: Client, served: Running, worker: AnsweringWorker, tmp_path: Path
) -> None:
    section = SketchSection(
        teacher_id="sketch/1", dimensions=512, selection="cross_attention_kv", query_draws=64, fidelity={"map100": 0.98}
    )
    served.registry.register(manifest("r2", "r1", section), tmp_path / "r2")
    served.registry.activate(MODEL, "r2")
    assert client.releases(MODEL)[0][0].sketches == Sketches(
        "sketch/1", 512, "cross_attention_kv", 64, {"map100": 0.98}
    )
    attribution = client.attribute(png(), tier="ESTIMATED")
    assert attribution.tier == "ESTIMATED" and attribution.influences[0].tau == pytest.approx(0.25)
    assert [a.tier for a in attribution.job.answers] == ["RETRIEVED", "ESTIMATED"]
    served.registry.rollback(MODEL)
    with pytest.raises(TierNotAvailable, match="r1"):
        client.submit(png(), tier="ESTIMATED")


def test_errors_are_the_classes_the_server_raised(client: Client, served: Running) -> None:
    with pytest.raises(TierNotAvailable, match="r1 has no sketches") as caught:
        client.submit(png(), tier="ESTIMATED")
    assert caught.value.field == "options.tier"
    with pytest.raises(JobNotFound):
        client.get(str(uuid.uuid4()))
    with pytest.raises(InvalidRequest, match="tier: guessed is unknown"):
        client.submit(png(), tier="guessed")
    with pytest.raises(ReleaseChanged):
        client.activate(MODEL, "r1", epoch=99)


def test_no_release_and_no_server_are_told_apart(running: Running) -> None:
    with Client(running.address, timeout=10.0) as client, pytest.raises(NoActiveRelease):
        client.submit(png())
    with Client("127.0.0.1:1", timeout=5.0) as client, pytest.raises((ServerUnreachable, CallTimedOut)):
        client.queues()


def test_a_timeout_of_attribute_leaves_the_job_running(client: Client) -> None:
    job = client.submit(png(), request_id=(request_id := str(uuid.uuid4())))
    with pytest.raises(CallTimedOut):
        client.attribute(png(), request_id=request_id, timeout=0.8)
    assert client.get(job).state == "QUEUED"


def test_an_image_too_large_for_one_message_is_uploaded_first(client: Client) -> None:
    big = png() + b"\0" * (4 * 1024 * 1024)
    job = client.submit(big)
    assert client.query_image(job) == big


def test_listing_follows_pages_and_filters_states(client: Client) -> None:
    jobs = [client.submit(png(), prompt=f"cat {i}") for i in range(5)]
    client.cancel(jobs[0])
    assert {job.id for job in client.list(states=["QUEUED"])} == {job.id for job in jobs[1:]}
    assert len(client.list(limit=2)) == 2


def test_a_watch_survives_the_end_of_its_stream(client: Client, served: Running) -> None:
    job = client.submit(png())
    states: list[str] = []
    started = threading.Event()

    def follow() -> None:
        for state in client.watch(job, timeout=20.0):
            states.append(state.state)
            started.set()

    thread = threading.Thread(target=follow)
    thread.start()
    assert started.wait(10)
    attribution = served.gateway.attribution
    served.loop.call_soon_threadsafe(attribution.drain)
    served.loop.call_soon_threadsafe(setattr, attribution, "_draining", False)
    claim = served.store.claim(uuid.UUID(job.id), Stage.LOOKUP, "w", 30.0, "r1")
    assert claim is not None
    served.store.complete(claim, answer(claim))
    thread.join(20)
    assert states[0] == "QUEUED" and states[-1] == "SUCCEEDED" and len(states) == len(set(states))


def test_an_item_can_be_shown_and_withdrawn(client: Client, worker: AnsweringWorker) -> None:
    attribution = client.attribute(png(), top_k=2)
    assert client.item_image(attribution.influences[0].name) == png("blue")
    assert client.withdraw(MODEL, [ITEMS[0]], reason="asked by the maker").withdrawn == (ITEMS[0],)
    answer = client.get(attribution.job).answer
    assert answer is not None and [i.item_id for i in answer.influences] == [ITEMS[1], ITEMS[2]]


def test_an_items_image_of_more_than_a_default_message_can_be_read(client: Client, served: Running) -> None:
    buffer = io.BytesIO()
    Image.frombytes("RGB", (1300, 1300), random.Random(0).randbytes(3 * 1300 * 1300)).save(buffer, "PNG")
    large = buffer.getvalue()
    assert len(large) > 4 * 1024 * 1024
    sha256 = served.context.blobs.put(large)
    served.context.catalog.add_items(MODEL, [Item(999, "noise", creator="ann", image_sha256=sha256)])
    assert client.item_image(f"corpora/{MODEL}/items/999") == large


def test_releases_and_queues_can_be_read(client: Client) -> None:
    releases, active = client.releases(MODEL)
    assert [release.id for release in releases] == ["r1"] and active is not None and active.epoch == 1
    assert {stage.stage for stage in client.queues().stages} == {"lookup", "estimate", "verify", "rank"}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_rollback_whose_answer_was_lost_is_not_carried_out_twice(
    served: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    served.registry.register(manifest("r2", parent="r1"), tmp_path / "r2")
    seen = served.registry.activate(MODEL, "r2")
    epochs: list[int | None] = []
    carry_out = served.context.registry.rollback

    def lose_the_answer(model_id: str, epoch: int | None, reason: str, principal: str) -> None:
        epochs.append(epoch)
        carry_out(model_id, epoch, reason, principal)
        raise DatabaseUnavailable("the connection broke after the commit")

    monkeypatch.setattr(served.context.registry, "rollback", lose_the_answer)

    async def rollback() -> None:
        async with AsyncClient(served.address, timeout=10.0) as client:
            await client.rollback(MODEL)

    with Client(served.address, timeout=10.0) as client:
        with pytest.raises(DatabaseUnavailable):
            asyncio.run(rollback()) if asynchronous else client.rollback(MODEL)
        assert epochs == [seen.epoch], "sent once, with the epoch that was read"
        active = served.registry.active(MODEL)
        assert active is not None and active.release_id == "r1"
        with pytest.raises(ReleaseChanged):
            client.rollback(MODEL, seen.epoch)
        assert served.registry.active(MODEL) == active


def test_the_asyncio_client_asks_many_at_once(served: Running, worker: AnsweringWorker) -> None:
    async def ask() -> list[int]:
        async with AsyncClient(served.address, timeout=10.0) as client:
            found = await asyncio.gather(*(client.attribute(png(), prompt=f"cat {i}", top_k=1) for i in range(8)))
            verified = await client.attribute(png(), tier="VERIFIED", top_k=1)
            assert verified.tier == "VERIFIED"
            assert len(await client.list()) == 9
            return [attribution.influences[0].item_id for attribution in found]

    assert asyncio.run(ask()) == [ITEMS[0]] * 8
