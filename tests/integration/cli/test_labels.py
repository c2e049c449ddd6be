"""``byline labels`` on a real Postgres."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from byline.catalog.store import CatalogStore, ModelRecord
from byline.cli.labels import app
from byline.db.session import make_engine
from byline.errors import LabelsNotUsable
from byline.rankings.snapshot import ARRAYS, METADATA, SnapshotHeader, SnapshotQuery, write_snapshot

HEADER = SnapshotHeader("openclipart", "rev1", "openclipart", "abu_plus_linear/1", "python data/labels/make.py")


@pytest.fixture
def machine(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Settings by environment, as a user has them, and a registered model."""
    monkeypatch.setenv("BYLINE_DATABASE_URL", database_url)
    monkeypatch.setenv("BYLINE_STATE_DIR", str(tmp_path / "state"))
    engine = make_engine(database_url)
    catalog = CatalogStore(engine)
    catalog.add_corpus("openclipart")
    catalog.add_model(ModelRecord("openclipart", "openclipart", tmp_path / "model", "rev1"))
    engine.dispose()
    values = np.linspace(-1, 1, 30, dtype=np.float32)
    queries = [SnapshotQuery(f"cat {i}", i, split, i, "corpus", "corpus", 64, bytes([i]) * 90, np.arange(30), values,
                             np.abs(values), np.stack([values, values]))
               for i, split in enumerate(["train", "train", "validation"])]
    write_snapshot(tmp_path / "labels", HEADER, queries)
    return tmp_path


def _run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_import_count_and_export_give_the_same_files(machine: Path):
    assert "3 rankings and 3 queries added, 0 were there" in _run("import", machine / "labels")
    assert "0 rankings and 0 queries added, 3 were there" in _run("import", machine / "labels")
    counted = _run("stats")
    assert "abu_plus_linear/1" in counted and counted.split("abu_plus_linear/1")[1].count("2") >= 1
    assert "3 rankings written" in _run("export", machine / "again", "--made-by", HEADER.made_by)
    for name in (METADATA, ARRAYS):
        assert (machine / "labels" / name).read_bytes() == (machine / "again" / name).read_bytes()


def test_labels_of_another_revision_are_refused_with_a_reason(machine: Path):
    write_snapshot(machine / "other", SnapshotHeader("openclipart", "rev2", "openclipart", "abu_plus_linear/1"), [])
    with pytest.raises(LabelsNotUsable, match="model_revision is 'rev2', here it is 'rev1'"):
        _run("import", machine / "other")
