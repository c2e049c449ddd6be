"""The service as it is put together, on a tiny pipeline: what it asks for, and that a pause ends it."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import Engine, text

from byline.catalog.blobs import BlobStore
from byline.catalog.items import Item
from byline.catalog.store import CatalogStore, ModelRecord
from byline.config import load_settings
from byline.db.session import make_engine, transaction
from byline.diffusion.tiny import write_tiny_pipeline
from byline.rankings.controls import set_budget, set_paused
from byline.rankings.store import RankingStore
from services.curation.plan import split_of
from services.curation.wiring import Wiring

MODEL = "toy"
#: Captions that a text encoder takes for one another, and a stored query of the other split.
NEAR, STORED = "a photograph of a small red apple on a table", "a photograph of a small red apple on the table"


@pytest.fixture
def engine(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    engine = make_engine(database_url)
    catalog, blobs = CatalogStore(engine), BlobStore(tmp_path / "state" / "blobs")
    picture = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(picture, "PNG")
    digest = blobs.put(picture.getvalue())
    catalog.add_corpus(MODEL)
    catalog.add_model(ModelRecord(MODEL, MODEL, tmp_path / "model", "rev1"))
    captions = [NEAR, *(f"{colour} {thing}" for colour in ("green", "black", "yellow", "white", "purple")
                        for thing in ("house", "violin", "whale", "tractor", "teapot", "mountain"))]  # fmt: skip
    catalog.add_items(MODEL, [Item(number, caption, image_sha256=digest, near_duplicate_group=number)
                              for number, caption in enumerate(captions, 1)])  # fmt: skip
    write_tiny_pipeline(tmp_path / "model", channels=8)
    for name, value in {
        "DATABASE_URL": database_url, "STATE_DIR": tmp_path / "state", "MODEL_DIRECTORY": tmp_path / "model",
        "MODEL_ID": MODEL, "CORPUS_ID": MODEL, "FEATURE_SPEC": "minilm", "CURATION_SAMPLING_STEPS": 1,
        "CURATION_CANDIDATES": 8, "CURATION_BATCH": 4, "CURATION_TARGET_OPEN": 100,
    }.items():  # fmt: skip
        monkeypatch.setenv(f"BYLINE_{name}", str(value))
    yield engine
    engine.dispose()


def test_chosen_and_drawn_queries_are_asked_for_and_nothing_after_a_pause(engine: Engine) -> None:
    other = "validation" if split_of(1) == "train" else "train"
    with transaction(engine) as connection:
        RankingStore(engine).add_query(connection, model_id=MODEL, prompt=STORED, seed=1, split=other,
                                       near_duplicate_group=99, image_sha256="0" * 64, source="live")  # fmt: skip
        set_budget(connection, MODEL, {"uniform_share": 0.5})
    curator = Wiring(engine, load_settings(), threading.Event()).curator()
    for _ in range(5):
        assert curator.tick()
    with transaction(engine) as connection:
        rows = connection.execute(text(
            "SELECT q.prompt, q.seed, c.chosen_for FROM query_choices c JOIN queries q ON q.id = c.query_id"
        )).all()  # fmt: skip
        set_paused(connection, MODEL, True, "")
    drawn = [row for row in rows if row.chosen_for == "uniform"]
    assert len(rows) == 20 and len(drawn) == 10 and min(row.seed for row in drawn) > 1 << 50
    assert len({row.prompt for row in drawn}) == 10  # all groups in turn
    assert max(row.seed for row in rows if row.chosen_for != "uniform") < 1 << 40
    assert NEAR not in {row.prompt for row in rows}
    assert not curator.tick()
    with transaction(engine) as connection:
        due = "SELECT count(*) FROM jobs WHERE state = 'QUEUED' AND next_attempt_at IS NULL"
        assert connection.execute(text(due)).scalar_one() == 0
