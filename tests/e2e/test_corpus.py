"""Added over the API, embedded by a process of its own, found by the lookup worker, withdrawn: all real processes."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from PIL import Image

from byline.catalog.store import CatalogStore
from byline.client.corpus import CorpusClient, NewItem
from byline.embedded.process import ServerProcess

from .conftest import CORPUS_ID, PATIENCE_S, Cluster, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(3600)]


def _picture(seed: int, quality: int | None = None) -> bytes:
    cells = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    out = io.BytesIO()
    image = Image.fromarray(cells).resize((64, 64), Image.Resampling.NEAREST)
    image.save(out, "PNG") if quality is None else image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def test_an_added_item_is_found_without_a_new_release_its_copy_takes_no_place_and_withdrawn_it_is_gone(
    cluster: Cluster, project: str
) -> None:
    process = ServerProcess.start(
        "additions", [sys.executable, "-m", "services.trainer", "--additions"], log=cluster.root / "additions.log",
        cwd=cluster.root, environment=cluster.environment, die_with_parent=True,
    )  # fmt: skip
    cluster.processes["additions"] = process
    release = cluster.registry.active("tiny")
    assert release is not None
    pictures = [_picture(seed) for seed in range(12)]
    new = [NewItem(data, f"squares {seed}", creator="ines") for seed, data in enumerate(pictures)]
    try:
        with CorpusClient(cluster.address, project=project, timeout=PATIENCE_S) as client:
            added = client.add_items(CORPUS_ID, [*new, NewItem(_picture(3, 70), "saved again", creator="ines")])
            assert added.count("ADDED") == 13
            client.wait_until_found(CORPUS_ID, added.corpus_sequence, timeout=PATIENCE_S)
            third = added.items[3].item_id

            def found() -> bool:
                answer = client.attribute(pictures[3], prompt="squares 3", top_k=5, timeout=PATIENCE_S)
                self_found = answer.influences[0].item_id in (third, added.items[12].item_id)
                return self_found and (answer.answer.corpus_sequence or 0) >= added.corpus_sequence

            # The worker hears of the delta a moment after its row is there.
            eventually(found, "the added item being found")
            answer = client.attribute(pictures[3], prompt="squares 3", top_k=5, timeout=PATIENCE_S)
            assert release.release_id in answer.release
            first = answer.influences[0]
            twins = {third, added.items[12].item_id}
            assert {first.item_id, *first.copies} <= twins
            # The other one may rank behind the first five groups; of the whole corpus it takes no place of its own.
            whole = client.attribute(pictures[3], prompt="squares 3", top_k=100, timeout=PATIENCE_S).influences
            assert [{one.item_id, *one.copies} for one in whole if twins & {one.item_id, *one.copies}] == [twins]
            assert len(twins & {one.item_id for one in answer.influences}) == 1
            assert len(answer.influences) == 5
            assert len({one.near_duplicate_group for one in answer.influences}) == 5

            client.withdraw_all(CORPUS_ID, creator="ines")
            gone = {one.item_id for one in added.items}
            after = client.attribute(pictures[3], prompt="squares 3", top_k=20, timeout=PATIENCE_S)
            again = client.get(answer.job)
            for shown in (after.influences, *(one.influences for one in again.answers)):
                assert not gone & {item_id for one in shown for item_id in (one.item_id, *one.copies)}
            assert gone <= CatalogStore(cluster.engine).withdrawn(CORPUS_ID)
    finally:
        process.stop(30.0)
        del cluster.processes["additions"]
