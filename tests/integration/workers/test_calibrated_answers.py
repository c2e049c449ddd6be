"""Probabilities, intervals and "not attributable", from the calibrator's fit to what a person reads.

Nothing is faked: the shipped generator and corpus, a calibrator fitted on labelled queries and null queries, a worker
and a gateway over a real Postgres, the client, and the command line's table.
"""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console

from byline.catalog.decode import encode_png
from byline.catalog.items import Item
from byline.catalog.store import ModelRecord
from byline.cli.demo_strangers import strangers
from byline.cli.page import page
from byline.cli.show import print_job, table, to_json
from byline.client import Client
from byline.config import load_settings, repository_root
from byline.diffusion.model import DiffusionModel
from byline.evaluation.calibrate import Calibration, ScoredNulls, ScoredQueries, fit_calibrator
from byline.evaluation.null_queries import make_null_queries
from byline.features import load_evidence, load_extractor
from byline.ranker.head import Head, HeadConfig, feature_blocks
from byline.ranker.labelled_set import dense_tau
from byline.rankings.snapshot import SnapshotQuery, read_snapshot
from byline.releases.builder import build_release
from byline.releases.manifest import ReleaseManifest
from byline.releases.registry import ReleaseRegistry
from services.gateway.context import build_context
from services.gateway.server import start
from services.workers.child import WorkerChild

#: The prompt alone, so that items can be encoded in seconds; the evidence looks at the image, with the generator.
FEATURES = "minilm"
ITEMS, TOP, MODEL = 240, 20, "openclipart"
DATA = repository_root() / "data"


@dataclass(frozen=True)
class Fitted:
    """A calibrated head over a part of the corpus, and queries it was not fitted on."""

    rows: list[dict]
    features: np.ndarray
    head: Head
    extractor_hash: str
    revision: str
    calibration: Calibration
    test: list[SnapshotQuery]


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    torch.set_num_threads(1)
    model = DiffusionModel.load(DATA / "generator")
    rows = pq.read_table(DATA / "openclipart" / "items.parquet", columns=["item_id", "caption", "creator", "image"])
    chosen = rows.take(np.linspace(0, rows.num_rows - 1, ITEMS).astype(int)).to_pylist()
    queries = read_snapshot(DATA / "labels")[1]
    held = [query for query in queries if query.split == "validation"][:24]
    test = [query for query in queries if query.split == "test"][:4]
    extractor, gain = load_extractor(FEATURES, model=model), load_evidence("prompt_gain", model=model)
    blank = Image.new("RGB", (8, 8))

    def texts(prompts: list[str]) -> np.ndarray:
        return extractor.extract([blank] * len(prompts), prompts)

    features, asked = texts([row["caption"] for row in chosen]), texts([query.prompt for query in held])
    head = Head(HeadConfig(extractor.dim, feature_blocks(extractor.spec.encoders, extractor.dims), (8,), 384, 0.0))
    head.initialise(features, asked, torch.Generator().manual_seed(0))
    ids = np.array([row["item_id"] for row in chosen])
    tau = dense_tau(ids, [query.item_ids for query in held], [query.tau for query in held])
    nulls = make_null_queries(model, [row["caption"] for row in chosen], per_kind=6, seed=0)
    items = head.embed_items(features)
    evidence = gain.extract([Image.open(io.BytesIO(q.image)).convert("RGB") for q in held], [q.prompt for q in held])
    best = (head.embed_queries(texts([null.prompt for null in nulls])) @ items.T).max(1).astype(np.float64)
    seen = ScoredNulls(
        tuple(null.kind for null in nulls), tuple(null.source for null in nulls), best,
        gain.extract([null.image for null in nulls], [null.prompt for null in nulls])[:, 0].astype(np.float64),
    )  # fmt: skip
    real = ScoredQueries(head.embed_queries(asked) @ items.T, tau, evidence[:, 0])
    found = fit_calibrator(real, None, seen, top=TOP, seed=0, encoder=("prompt_gain", gain.preprocessing_hash))
    assert found.calibrator.curve is not None and found.abstention is not None
    return Fitted(chosen, features, head, extractor.preprocessing_hash, model.revision, found, test)


@pytest.fixture
def client(fitted: Fitted, database_url: str, tmp_path: Path) -> Iterator[Client]:
    """A gateway and a lookup worker that serve the release of ``fitted``."""
    settings = load_settings(
        database_url=database_url, state_dir=tmp_path, grpc_address="127.0.0.1:0", model_id=MODEL, corpus_id=MODEL,
        model_directory=DATA / "generator", feature_spec=FEATURES,
    )  # fmt: skip
    context = build_context(settings)
    items = [Item(row["item_id"], row["caption"], creator=row["creator"], image_sha256=context.blobs.put(row["image"]))
             for row in fitted.rows]  # fmt: skip
    context.catalog.add_corpus(MODEL)
    context.catalog.add_items(MODEL, items)
    context.catalog.add_model(ModelRecord(MODEL, MODEL, DATA / "generator", fitted.revision))
    directory = build_release(
        tmp_path / "releases", release_id="r1", model_id=MODEL, model_revision=fitted.revision, corpus_id=MODEL,
        head=fitted.head, feature_spec=FEATURES, preprocessing_hash=fitted.extractor_hash,
        item_ids=np.array([item.item_id for item in items]), item_features=fitted.features, catalogue=items,
        calibrator=fitted.calibration.calibrator.to_json(), metrics={"calibration": fitted.calibration.to_json()},
        parent=None, labels={"queries": 0, "digest": ""}, teacher_id="none", golden_features=fitted.features[:1],
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
    )  # fmt: skip
    registry = ReleaseRegistry(context.engine)
    registry.register(ReleaseManifest.read(directory), directory)
    registry.activate(MODEL, "r1")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    gateway = asyncio.run_coroutine_threadsafe(start(context, settings.grpc_address, database_url), loop).result(20)
    worker = WorkerChild("lookup", settings, "w1", threading.Event())
    try:
        worker.start()
        with Client(gateway.address, timeout=60.0, model=MODEL) as client:
            yield client
    finally:
        worker.close()
        asyncio.run_coroutine_threadsafe(gateway.stop(0.0, 1.0), loop).result(20)
        context.close()
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def shown(client: Client, job_name: str) -> str:
    """What `byline show` prints."""
    job = client.get(job_name)
    assert job.answer is not None
    out = io.StringIO()
    Console(file=out, width=400).print(table(job, job.answer))
    return " ".join(out.getvalue().split())


def test_real_queries_come_with_probabilities_and_strangers_are_not_attributed(
    client: Client, fitted: Fitted, capsys: pytest.CaptureFixture[str]
) -> None:
    depth = fitted.calibration.calibrator.depth
    for query in fitted.test:
        found = client.attribute(query.image, query.prompt, top_k=3)
        assert found.answer.not_attributable is False and not found.not_attributable
        assert found.answer.evidence is not None and found.answer.evidence_floor is not None
        assert found.answer.evidence >= found.answer.evidence_floor and found.answer.noise_floor is not None
        longer = client.attribute(query.image, query.prompt, top_k=2 * depth)
        given = [one.probability for one in longer.influences]
        assert len(given) == 2 * depth and all(one is not None for one in given)
        values = [one.value for one in given if one]
        assert values == sorted(values, reverse=True) and values[0] > 2 * values[-1] and values[0] > 0.2
        assert all(one and 0 <= one.low <= one.value <= one.high <= 1 for one in given)
        assert {(one.coverage, one.top) for one in given if one} == {(0.9, TOP)}
        # Whatever part of the list was asked for: its probabilities are the same.
        assert [one.probability for one in found.influences] == given[:3]
    text = shown(client, found.job.name)
    assert f"P(top {TOP})" in text and f"{given[0].value:.2f} ({given[0].low:.2f}–{given[0].high:.2f})" in text
    assert "an interval that holds 90%" in text and "NOT ATTRIBUTABLE" not in text
    assert f"P(top {TOP})" in page(client.get(found.job.name), None, {})

    first, other = fitted.test[0], fitted.test[1]
    noise = np.random.default_rng(5).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    grey, noisy = Image.new("RGB", (64, 64), (120, 130, 90)), Image.fromarray(noise)
    (photograph, under), _ = strangers([(first.image, first.prompt), (other.image, other.prompt)])  # the demo's own
    for picture, prompt in ((photograph, under), (encode_png(grey), first.prompt), (encode_png(noisy), first.prompt),
                            (first.image, other.prompt)):
        refused = client.attribute(picture, prompt, top_k=5)
        assert refused.answer.not_attributable and refused.not_attributable
        assert refused.answer.evidence is not None and refused.answer.evidence < (refused.answer.evidence_floor or 0.0)
        # What came nearest is shown all the same, and its score alone would not have given it away.
        assert len(refused.influences) == 5
    text = shown(client, refused.job.name)
    assert "NOT ATTRIBUTABLE: the model seems not to have made this image from this prompt" in text
    assert "NOT ATTRIBUTABLE" in page(client.get(refused.job.name), None, {})
    assert '"not_attributable": true' in to_json(client.get(refused.job.name))
    print_job(client.get(refused.job.name), as_json=True)
    assert '"evidence_floor"' in capsys.readouterr().out


def test_of_a_query_without_a_prompt_nothing_is_said_as_a_whole_for_its_score_alone_tells_nothing(
    client: Client, fitted: Fitted
) -> None:
    found = client.attribute(fitted.test[0].image, "", top_k=1)
    floors = fitted.calibration.calibrator.abstention
    assert floors is not None and floors.floor_alone is None
    assert found.answer.evidence is None and found.answer.noise_floor is None
    assert found.answer.not_attributable is None and found.influences[0].probability is not None
