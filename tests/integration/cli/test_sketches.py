"""``byline sketches`` on a real Postgres, with a tiny model."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from byline.catalog.blobs import BlobStore
from byline.catalog.items import Item
from byline.catalog.store import CatalogStore, ModelRecord
from byline.cli.sketches import app
from byline.db.session import make_engine, transaction
from byline.diffusion.model import directory_revision
from byline.diffusion.tiny import write_tiny_pipeline
from byline.errors import InvalidRequest
from byline.rankings.store import RankingStore
from byline.teachers.sketch_set import SketchSet


def _png(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def machine(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Settings by environment, as a user has them; six items of which one is withdrawn, and two queries."""
    model = write_tiny_pipeline(tmp_path / "model")
    for name, value in {
        "DATABASE_URL": database_url, "STATE_DIR": tmp_path / "state", "MODEL_ID": "tiny", "CORPUS_ID": "tiny",
        "CURATION_DRAWS": 8, "ESTIMATE_DRAWS": 8,
    }.items():  # fmt: skip
        monkeypatch.setenv(f"BYLINE_{name}", str(value))
    engine = make_engine(database_url)
    catalog, blobs = CatalogStore(engine), BlobStore(tmp_path / "state" / "blobs")
    catalog.add_corpus("tiny")
    catalog.add_items("tiny", [Item(n, f"a red cat w{n}", image_sha256=blobs.put(_png(n))) for n in range(1, 7)])
    catalog.withdraw([2])
    catalog.add_model(ModelRecord("tiny", "tiny", model, directory_revision(model)))
    with transaction(engine) as connection:
        for seed in (1, 2):
            RankingStore(engine).add_query(
                connection, model_id="tiny", prompt="a red cat", seed=seed, split="test", near_duplicate_group=1,
                image_sha256=blobs.put(_png(100 + seed)), source="corpus",
            )  # fmt: skip
    engine.dispose()
    return tmp_path


def _run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def test_sketches_are_fitted_shown_and_not_fitted_twice(machine: Path) -> None:
    assert "has no sketches" in _run("show", code=1)
    fitted = _run("fit", "--dimensions", 3, "--coordinates", 100)
    assert "5 items in 3 dimensions of cross_attention_kv" in fitted and "2 queries: map100" in fitted
    [folder] = (machine / "state" / "cache").glob("teachers-*/sketches-cross_attention_kv")
    found = SketchSet.load(folder, folder.parent.name.removeprefix("teachers-"))
    assert found.item_ids.tolist() == [1, 3, 4, 5, 6]
    # The withdrawn item was trained on: it counts for the step.
    assert (found.basis.corpus_size, found.basis.settings.query_draws) == (6, 8)
    assert not list(folder.parent.glob(".fitting-sketches*")), "what a finished fit resumed from is gone"
    assert "0 items of the corpus came later" in _run("show")
    assert "already" in _run("fit", "--dimensions", 4)
    assert "in 4 dimensions" in _run("fit", "--dimensions", 4, "--coordinates", 100, "--again")


def test_unknown_layers_are_refused(machine: Path) -> None:
    with pytest.raises(InvalidRequest, match="layers"):
        _run("fit", "--layers", "the_best")
