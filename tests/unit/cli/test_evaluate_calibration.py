"""``byline evaluate calibration`` from label files, without a server: tiny, but the real path."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from byline.cli.evaluate import app
from byline.diffusion.model import directory_revision
from byline.diffusion.tiny import write_tiny_pipeline
from byline.errors import InvalidRequest
from byline.evaluation.calibration import Calibrator
from byline.evaluation.null_queries import KINDS
from byline.rankings.snapshot import SnapshotHeader, SnapshotQuery, write_snapshot

ITEMS, TOP = 60, 10
ANIMALS = ("cat", "dog", "horse", "fish", "bird", "cow")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus of animals, labels by which the same animal influences most, and a generator of random weights."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    ids = np.arange(1000, 1000 + ITEMS)

    def png() -> bytes:
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(out, "PNG")
        return out.getvalue()

    pq.write_table(pa.table({
        "item_id": ids, "caption": [f"a {ANIMALS[n % 6]} {n}" for n in range(ITEMS)], "image": [png() for _ in ids],
    }), tmp_path / "items.parquet")  # fmt: skip
    model = write_tiny_pipeline(tmp_path / "model")
    queries = []
    for n in range(42):
        tau = np.array([float(item % 6 == n % 6) for item in range(ITEMS)], dtype=np.float32)
        halves = np.stack([tau + 0.1 * rng.normal(size=ITEMS) for _ in range(2)]).astype(np.float32)
        split = "train" if n < 18 else "validation" if n < 30 else "test"
        queries.append(SnapshotQuery(
            prompt=f"{ANIMALS[n % 6]} number {n}", seed=n, split=split, near_duplicate_group=n, source="corpus",
            candidate_set="corpus", draws=8, image=png(), item_ids=ids, tau=halves.mean(0),
            standard_error=np.full(ITEMS, 0.1, np.float32), tau_halves=halves,
        ))  # fmt: skip
    write_snapshot(tmp_path / "labels", SnapshotHeader("m", directory_revision(model), "c", "t"), queries)
    for name, value in {"STATE_DIR": tmp_path / "state", "CORPUS_SOURCE": tmp_path / "items.parquet",
                        "MODEL_DIRECTORY": model, "FEATURE_SPEC": "minilm", "LABELS_DIR": tmp_path / "labels"}.items():
        monkeypatch.setenv(f"BYLINE_{name}", str(value))
    return tmp_path


def test_the_command_says_all_that_a_release_is_judged_by(place: Path) -> None:
    out = place / "reports" / "calibration.json"
    arguments = ["calibration", "-L", str(TOP), "--nulls", "2", "--out", str(out)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert found["queries"] == {"fitted_on": 12, "judged_on": 12} and found["left_out"] == []
    assert 0 <= found["curve"]["retrieved"]["error"] < 0.2 and found["curve"]["top"] == TOP
    assert found["curve"]["interval"]["nominal"] == 0.9
    assert set(found["abstention"]["false_attribution"]) == set(KINDS) and found["abstention"]["nulls"] == 8
    assert found["evidence_ms"]["evidence"] > 0 and out.with_suffix(".png").stat().st_size > 10_000
    assert Calibrator.from_json(found["calibrator"]).depth == TOP
    assert "12 test queries" in done.output and "null queries" in done.output
    # Made once, then read: the same figures from the same files.
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    again = json.loads(out.read_text())
    assert (again["curve"], again["abstention"]) == (found["curve"], found["abstention"])


def test_a_head_that_is_no_file_is_refused(place: Path) -> None:
    with pytest.raises(InvalidRequest, match="neither a release directory nor a head file"):
        CliRunner().invoke(app, ["calibration", "--head", "r1"], catch_exceptions=False)
