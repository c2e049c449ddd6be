"""``python -m services.trainer --once`` and ``byline evaluate head`` as processes, with real encoders and images."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from byline.catalog.blobs import BlobStore
from byline.catalog.items import Item
from byline.catalog.store import CatalogStore, ModelRecord
from byline.db.session import make_engine
from byline.diffusion.tiny import write_tiny_pipeline
from byline.evaluation.calibration import Calibrator
from byline.evaluation.null_queries import KINDS
from byline.rankings.snapshot import SnapshotHeader, SnapshotQuery, import_snapshot, write_snapshot
from byline.releases.manifest import CALIBRATOR
from byline.releases.registry import ReleaseRegistry

ITEMS = 40


def _picture(colour: np.ndarray, rng: np.random.Generator) -> bytes:
    """A noisy disc of one colour on white."""
    y, x = np.mgrid[:32, :32] - 16
    pixels = np.full((32, 32, 3), 255.0)
    pixels[(x**2 + y**2) < 150] = colour
    buffer = io.BytesIO()
    noisy = np.clip(pixels + rng.normal(size=pixels.shape) * 8, 0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def environment(database_url: str, tmp_path: Path) -> dict[str, str]:
    """A corpus of coloured discs whose influence is the nearness of colours, and the settings for its trainer."""
    rng = np.random.default_rng(0)
    engine = make_engine(database_url)
    blobs = BlobStore(tmp_path / "state" / "blobs")
    colours = rng.uniform(0, 255, size=(ITEMS, 3))
    catalog = CatalogStore(engine)
    catalog.add_corpus("discs")
    catalog.add_items("discs", [Item(i, f"a disc number {i}", image_sha256=blobs.put(_picture(colour, rng)))
                                for i, colour in enumerate(colours)])
    catalog.add_model(ModelRecord("discs", "discs", write_tiny_pipeline(tmp_path / "model"), "rev1"))
    queries = []
    for number in range(30):
        colour = rng.uniform(0, 255, size=3)
        tau = -np.linalg.norm(colours - colour, axis=1) / 255
        halves = (tau + 0.02 * rng.normal(size=(2, ITEMS))).astype(np.float32)
        queries.append(SnapshotQuery(
            f"a disc {number}", number, "train" if number < 20 else "validation", number, "corpus", "corpus", 64,
            _picture(colour, rng), np.arange(ITEMS), halves.mean(0), np.full(ITEMS, 0.02, np.float32), halves))
    header = SnapshotHeader("discs", "rev1", "discs", "abu_plus_linear+output_norm/1")
    write_snapshot(tmp_path / "labels", header, queries)
    import_snapshot(engine, blobs, tmp_path / "labels", model_id="discs", model_revision="rev1", corpus_id="discs")
    engine.dispose()
    own = {name: value for name, value in os.environ.items() if not name.startswith("BYLINE_")}
    return {
        **own, "BYLINE_DATABASE_URL": database_url, "BYLINE_STATE_DIR": str(tmp_path / "state"),
        "BYLINE_MODEL_ID": "discs", "BYLINE_CORPUS_ID": "discs", "BYLINE_FEATURE_SPEC": "efficientnet_lite0+minilm",
        "BYLINE_GATE_MAP_AT": "10", "BYLINE_TRAINER_EPOCHS": "20", "OMP_NUM_THREADS": "1",
    }


def _run(environment: dict[str, str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, *arguments], env={**environment, "PYTHONPATH": paths}, cwd=folder,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_refresh_publishes_a_release_and_its_evaluation_agrees(environment, database_url, tmp_path: Path):
    outcome = json.loads(_run(environment, tmp_path, "-m", "services.trainer", "--once").stdout)
    assert outcome["activated"], outcome
    assert outcome["map"]["head"] > max(outcome["map"]["raw"].values())
    engine = make_engine(database_url)
    registry = ReleaseRegistry(engine)
    active = registry.active("discs")
    assert active is not None and active.release_id == outcome["release_id"]
    record = registry.get(active.release_id)
    engine.dispose()
    calibrator = Calibrator.from_json(json.loads((record.directory / CALIBRATOR).read_text()))
    assert calibrator.top == 10 and calibrator.curve is not None and calibrator.abstention is not None
    assert calibrator.abstention.evidence is not None and calibrator.abstention.evidence.encoder == "prompt_gain"
    judged = record.manifest.metrics["calibration"]
    # Ten queries of one split: enough to fit on, not to judge the curve on; nulls are judged across their sources.
    assert judged["curve"] is None and "not judged on test queries: there are too few" in judged["left_out"]
    assert set(judged["abstention"]["false_attribution"]) == set(KINDS) and judged["abstention"]["pooled"] <= 0.1
    _run(environment, tmp_path, "-c", "from byline.cli.evaluate import app; app()", "head", "--split", "validation",
         "-L", "10")
    written = json.loads((tmp_path / "reports" / "evaluate" / "head.json").read_text())
    assert written["release_id"] == outcome["release_id"]
    assert written["map"]["head"] == pytest.approx(outcome["map"]["head"], abs=1e-4)
    assert written["map"]["raw"] == pytest.approx(outcome["map"]["raw"], abs=1e-4)
    assert {"command", "seconds", "machine", "commit", "seed"} <= written.keys()
