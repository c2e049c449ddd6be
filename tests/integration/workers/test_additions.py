"""Items that are added are found by the lookup, without a new release: real Postgres, a real head, real encoders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from byline.catalog.decode import decode_image
from byline.catalog.items import Item
from byline.catalog.look import look_of
from byline.errors import FeatureMismatch
from byline.features import FeatureExtractor
from byline.jobs.runner import RunOutcome
from byline.ranker.head import load_head
from byline.rankings.features import LabelFeatures
from byline.releases.delta import DeltaState, DeltaStore
from byline.releases.delta_view import Delta, extended
from byline.releases.manifest import HEAD
from services.trainer.additions import Additions

from .conftest import Bench, png
from .test_lookup import World, extractor  # noqa: F401 - a fixture

ADDED = range(101, 107)


@pytest.fixture
def world(
    bench: Bench, extractor: FeatureExtractor, tiny_model: Path, tmp_path: Path, database_url: str  # noqa: F811
) -> Iterator[World]:
    made = World(bench, extractor, tiny_model, tmp_path, database_url)
    made.publish("r1")
    made.registry.activate("tiny", "r1")
    made.serving.start()
    yield made
    bench.stop.set()
    made.serving.close()


@pytest.fixture
def additions(world: World, extractor: FeatureExtractor, tmp_path: Path) -> Additions:  # noqa: F811
    features = LabelFeatures(extractor, world.bench.blobs, tmp_path / "cache", "tiny")
    return Additions(world.bench.engine, "tiny", lambda manifest: features, block=2)


def _item(world: World, number: int, **more: object) -> Item:
    return Item(number, f"a blue dog w{number}", image_sha256=world.bench.blobs.put(png(number)), **more)


def _asks_for(world: World, item: Item, **more: object) -> dict:
    job = world.job(prompt=item.caption, image_sha256=item.image_sha256, **more)
    assert world.run(job) is RunOutcome.COMPLETED
    return world.answer(job)


def test_an_added_item_is_found_with_the_score_a_release_with_it_would_give(world: World, additions: Additions):
    items = [_item(world, number) for number in ADDED]
    before = _asks_for(world, items[0], top_k=12)
    assert {int(one["item_id"]) for one in before["influences"]} == {item.item_id for item in world.bench.items}
    inserted = world.bench.catalog.add_items("tiny", items)
    assert additions.catch_up_all() == len(items)
    answer = _asks_for(world, items[0], top_k=12)
    assert len(answer["influences"]) == 12
    assert (answer["release_id"], answer["corpus_sequence"]) == ("r1", inserted.sequence)
    assert answer["delta_sequence"] > before["delta_sequence"]
    found = {int(one["item_id"]): one for one in answer["influences"]}
    assert found[101]["caption"] == items[0].caption
    # The merged release holds them itself, with the same scores, and needs no delta.
    world.bench.items.extend(items)
    world.publish("r2", head=load_head(world.root / "releases" / "r1" / HEAD))
    world.registry.activate("tiny", "r2")
    additions.catch_up_all()
    world.serving._holder.refresh()
    merged = _asks_for(world, items[0], top_k=12)
    assert merged["release_id"] == "r2"
    assert [one["item_id"] for one in merged["influences"]] == [one["item_id"] for one in answer["influences"]]
    np.testing.assert_allclose(
        [one["cosine"] for one in merged["influences"]], [one["cosine"] for one in answer["influences"]], atol=1e-5
    )
    assert DeltaStore(world.bench.engine).ids("r2") == frozenset()


def test_an_added_item_that_is_withdrawn_is_found_no_more(world: World, additions: Additions):
    items = [_item(world, number) for number in ADDED]
    world.bench.catalog.add_items("tiny", items)
    world.bench.catalog.withdraw([102])
    additions.catch_up_all()
    assert 102 not in DeltaStore(world.bench.engine).ids("r1")
    answer = _asks_for(world, items[0], top_k=12)
    assert {int(one["item_id"]) for one in answer["influences"]} >= {101, 103, 104}
    world.bench.catalog.withdraw([103])
    world.lookup._withdrawn.changed()
    answer = _asks_for(world, items[0], top_k=12)
    assert not {102, 103} & {int(one["item_id"]) for one in answer["influences"]}


def test_one_broken_image_does_not_keep_the_others_from_being_found(world: World, additions: Additions):
    good, gone = _item(world, 101), Item(102, "its file is lost", image_sha256="0" * 64)
    inserted = world.bench.catalog.add_items("tiny", [good, gone])
    additions.catch_up_all()
    store = DeltaStore(world.bench.engine)
    assert store.ids("r1") == {101}
    assert store.state("r1").corpus_sequence == inserted.sequence


def test_two_processes_share_the_work_and_every_item_comes_once(
    world: World, additions: Additions, extractor: FeatureExtractor, tmp_path: Path  # noqa: F811
):
    from concurrent.futures import ThreadPoolExecutor

    features = LabelFeatures(extractor, world.bench.blobs, tmp_path / "cache", "tiny")
    other = Additions(world.bench.engine, "tiny", lambda manifest: features, block=2)
    inserted = world.bench.catalog.add_items("tiny", [_item(world, number) for number in ADDED])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda one: one.catch_up("r1"), (additions, other)))
    store = DeltaStore(world.bench.engine)
    delta = extended(Delta(DeltaState("r1")), store)
    assert delta.index is not None
    assert delta.index.ids.tolist() == list(ADDED)
    assert delta.state.corpus_sequence == inserted.sequence


def test_a_copy_joins_the_group_and_takes_no_second_place(world: World, additions: Additions):
    original = world.bench.items[2]
    image = decode_image(world.bench.blobs.get(original.image_sha256))
    looks = {}
    # The bench's items were stored without their looks: as one from before they were kept.
    copies = [_item(world, 201), Item(202, original.caption, image_sha256=original.image_sha256)]
    looks |= {201: look_of(image), 202: look_of(image)}
    inserted = world.bench.catalog.add_items("tiny", copies, looks)
    assert inserted.groups[201] == inserted.groups[202]
    additions.catch_up_all()
    together = _asks_for(world, original, top_k=7)["influences"]  # six items, and the copies as one
    ranks = {int(one["item_id"]): one["rank"] for one in together}
    assert len(together) == 8 and ranks[201] == ranks[202]
    assert sorted(set(ranks.values())) == list(range(1, 8))
    # With places for the groups that come before the second copy it is there, and takes none of them.
    listed = [int(one["item_id"]) for one in together]
    second = max(listed.index(201), listed.index(202))
    groups = len({ranks[item_id] for item_id in listed[: second + 1]})
    few = [int(one["item_id"]) for one in _asks_for(world, original, top_k=groups)["influences"]]
    assert few == listed[: len(few)] and {201, 202} <= set(few)
    assert len({ranks[item_id] for item_id in few}) == groups < len(few)
    apart = _asks_for(world, original, top_k=8, payload={"copies": "apart"})["influences"]
    assert [one["rank"] for one in apart] == list(range(1, 9))
    assert {int(one["item_id"]) for one in apart} == set(ranks)


def test_an_item_withdrawn_while_the_others_are_encoded_is_not_waited_for(world: World, additions: Additions):
    inserted = world.bench.catalog.add_items("tiny", [_item(world, number) for number in ADDED])
    encode = additions._target("r1").encoder.encode_items

    class Encoder:
        """Withdraws an item of a later block while it encodes the first."""

        def encode_items(self, items):
            world.bench.catalog.withdraw([105])
            return encode(items)

    additions._targets["r1"] = replace(additions._targets["r1"], encoder=Encoder())
    additions.catch_up("r1")
    store = DeltaStore(world.bench.engine)
    assert store.ids("r1") == set(ADDED) - {105}
    assert store.state("r1").corpus_sequence == inserted.sequence


def test_a_release_that_cannot_be_opened_is_not_tried_again_at_once(world: World, tmp_path: Path):
    now, tried = [0.0], []

    def refused(manifest):
        tried.append(manifest.release_id)
        raise FeatureMismatch("other encoders")

    additions = Additions(world.bench.engine, "tiny", refused, clock=lambda: now[0])
    for now[0] in (0.0, 2.0, 29.0, 31.0):
        assert additions.catch_up_all() == 0
    assert tried == ["r1", "r1"]


def test_only_the_releases_used_last_are_kept_open(world: World, additions: Additions):
    head = load_head(world.root / "releases" / "r1" / HEAD)
    for name in ("r2", "r3", "r4"):
        world.publish(name, head=head)
        additions.catch_up(name)
        assert len(additions._targets) <= 2
    additions.catch_up("r3")
    additions.catch_up("r1")
    assert list(additions._targets) == ["r3", "r1"]
