"""``byline study``: every study at its smallest, end to end on random weights; the second run fits nothing."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from byline.cli.study import STUDIES, study
from byline.diffusion.model import DiffusionModel
from byline.diffusion.tiny import write_tiny_pipeline
from byline.errors import InvalidRequest
from byline.evaluation import study_bench
from byline.evaluation.study_losses import NINE
from byline.features.gradient import fit_gradient_feature
from byline.rankings.snapshot import SnapshotHeader, SnapshotQuery, write_snapshot
from byline.teachers import TeacherItem
from byline.teachers.curvature_fit import fit_curvature
from byline.teachers.files import SKETCHES, curvature_name
from byline.teachers.first_order import AbuPlusLinear
from byline.teachers.gradient_basis import FOLDER
from byline.teachers.natural_gradient import UnlearningSettings
from byline.teachers.sketch_fit import fit_sketches

ITEMS, QUERIES = 48, 24


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout's data in small: influence is likeness of two hidden numbers, one of colour and one of words."""
    place = tmp_path_factory.mktemp("study")
    rng = np.random.default_rng(0)
    hidden = rng.uniform(size=(ITEMS + QUERIES, 2))
    pictures: list[bytes] = []
    captions: list[str] = []
    for shade, word in hidden:
        out = io.BytesIO()
        pixels = np.clip(rng.normal(255 * shade, 20, (8, 8, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(out, "PNG")
        pictures.append(out.getvalue())
        captions.append(f"a {'red' if word < 0.5 else 'blue'} {'cat' if word % 0.5 < 0.25 else 'car'} w{len(captions)}")
    ids = np.arange(1000, 1000 + ITEMS)
    pq.write_table(pa.table({"item_id": ids, "caption": captions[:ITEMS], "image": pictures[:ITEMS]}),
                   place / "items.parquet")
    write_tiny_pipeline(place / "model", channels=8)
    fit_gradient(place, [TeacherItem(i, Image.open(io.BytesIO(p)).convert("RGB"), c)
                         for i, p, c in zip(ids.tolist(), pictures, captions, strict=False)])  # fmt: skip
    tau = -np.linalg.norm(hidden[ITEMS:, None] - hidden[None, :ITEMS], axis=2)
    halves = (tau + 0.05 * rng.standard_normal((2, *tau.shape))).astype(np.float32)
    queries = [
        SnapshotQuery(prompt=captions[ITEMS + n], seed=n, split=("train", "validation", "test")[n % 3],
                      near_duplicate_group=n, source="corpus", candidate_set="corpus", draws=8,
                      image=pictures[ITEMS + n], item_ids=ids, tau=halves[:, n].mean(0), standard_error=halves[0, n],
                      tau_halves=halves[:, n])
        for n in range(QUERIES)
    ]  # fmt: skip
    write_snapshot(place / "labels", SnapshotHeader("m", "r", "c", "t"), queries)
    lds = {"variants": [{"variant": "d_trak cross_attention_kv 0.1", "lds": 0.5, "error": 0.1}]}
    (place / "lds.json").write_text(json.dumps(lds))
    blocks = "".join(f"<!-- study:{n} -->\nold\n<!-- /study:{n} -->\n" for n in STUDIES)
    (place / "studies.md").write_text(f"before\n{blocks}after\n")
    return place


def fit_gradient(place: Path, items: list[TeacherItem]) -> None:
    """What encoder ``gradient`` needs, beside the model: curvature and a basis of a few directions."""
    torch.set_num_threads(1)
    model = DiffusionModel.load(place / "model")
    latents, states = (model.encode_images([i.image for i in items]), model.encode_prompts([i.caption for i in items]))
    curvature = fit_curvature(model, latents, states, samples=64, seed=0)
    settings = UnlearningSettings(corpus_size=len(items), query_draws=8, item_draws=8, noise="shared",
                                  objective="output_norm")  # fmt: skip
    teacher = AbuPlusLinear(model, curvature, settings)
    sketches = fit_sketches(teacher, items, dimensions=3, store=place / "sketches")
    sketches.save(place / "model" / SKETCHES)
    tokens = sketches.tokens
    assert tokens is not None
    fit_gradient_feature(teacher, tokens, [], None, place / "model" / FOLDER, dimensions=12)
    (place / "model" / curvature_name(curvature.selection)).mkdir()
    curvature.save(place / "model" / curvature_name(curvature.selection))


@pytest.fixture(autouse=True)
def settings(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BYLINE_CORPUS_SOURCE", str(place / "items.parquet"))
    monkeypatch.setenv("BYLINE_MODEL_DIRECTORY", str(place / "model"))
    monkeypatch.setenv("BYLINE_LABELS_DIR", str(place / "labels"))
    monkeypatch.chdir(place)


def run(place: Path, name: str, *arguments: str) -> Result:
    app = typer.Typer()
    app.command()(study)
    shared = ("--size", "tiny", "--threads", "1", "--work", str(place / "work"), "--out", str(place / "out"))
    return CliRunner().invoke(app, [name, *shared, *arguments], catch_exceptions=False)


def numbers(found: object) -> list[float]:
    """All numbers of a document, but for times."""
    if isinstance(found, dict):
        return [x for k, v in found.items() if "ms" not in k and "seconds" not in k for x in numbers(v)]
    if isinstance(found, list):
        return [x for v in found for x in numbers(v)]
    return [float(found)] if isinstance(found, (int, float)) else []


def test_all_studies_end_in_a_json_a_figure_and_tables_and_a_second_run_fits_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(place, "all", "--page", str(place / "studies.md"), "--lds", str(place / "lds.json"))
    assert result.exit_code == 0, result.output
    first = {name: json.loads((place / "out" / f"{name}.json").read_text()) for name in STUDIES}
    page = (place / "studies.md").read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "\nold\n" not in page
    for name, found in first.items():
        assert (place / "out" / f"{name}.png").stat().st_size > 5000
        assert f"](figures/study-{name}.png)" in page and (place / "figures" / f"study-{name}.png").exists()
        assert all(math.isfinite(x) for x in numbers(found)), name
        assert found["command"].startswith("byline") and found["machine"]["cores"] >= 1
        table = page.partition(f"study:{name} -->")[2].partition("<!-- /")[0]
        assert ("| all token gradients" if name == "gradient" else "| per-caption mean rank") in table, name

    tuned = {r["name"]: r for r in first["features"]["rows"] if r["kind"] == "tuned"}
    for name in ("minilm+denoiser", "minilm+gradient"):
        [whole] = [r for r in first["pruning"]["heads"] if r["k"] == ITEMS and r["encoders"] == f"{name}, listwise"]
        assert tuned[name]["map6"] == whole["map6"], name
    assert tuned["gradient"]["best_step"] == 0, "its one number is chosen, nothing is fitted"
    losses = {r["name"]: r["searchable"] for r in first["losses"]["rows"]}
    assert losses["listwise"] and losses["bce_rank"] and not losses[NINE]
    recalls = [r["mean"] for r in first["pruning"]["recall"] if r["feature"] == "minilm"]
    assert recalls == sorted(recalls) and recalls[-1] == 1.0
    exact = {(r["head"], r["way"], r["dimensions"]): r for r in first["dimensions"]["rows"] if r["tier"] == "float32"}
    for name in ("minilm+denoiser", "minilm+gradient"):
        assert exact[name, "nested", 8]["bytes_per_item"] == exact[name, "reduced", 8]["bytes_per_item"] == 32
    assert exact["minilm+denoiser", "separate", 8]["bytes_per_item"] == 32
    assert ("minilm+gradient", "nested", 12 + 16 + 1) in exact, "the direct columns, the network's and the prior"
    assert {r["choice"] for r in first["labels"]["budget"]} == {"uniform", "nearest"}
    assert set(first["teachers"]["teachers"]) == {"curation", "abu_plus", "abu_plus_linear all", "trak", "d_trak"}
    cuts = {kind: [r["map6"]["mean"] for r in first["gradient"]["rows"] if r["kind"] == kind]
            for kind in ("draws", "directions", "columns")}  # fmt: skip
    assert len(cuts["draws"]) == 4 and cuts["columns"], cuts
    assert first["teachers"]["lds"] == {"d_trak": {"mean": 0.5, "error": 0.1}}

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a second run must find every row")

    monkeypatch.setattr(study_bench, "fit_student", refuse)
    monkeypatch.setattr("byline.evaluation.study_teachers.fit_student", refuse)
    monkeypatch.setattr("byline.evaluation.study_losses.fit_published_ordinal", refuse)
    monkeypatch.setattr("byline.teachers.item_gradients.ItemGradients.block", refuse)
    run(place, "all", "--lds", str(place / "lds.json"))
    for name in STUDIES:
        again = json.loads((place / "out" / f"{name}.json").read_text())
        assert numbers(again) == numbers(first[name]), name


def test_what_is_not_there_is_named(place: Path) -> None:
    with pytest.raises(InvalidRequest, match="colours"):
        run(place, "colours")
    with pytest.raises(InvalidRequest, match="huge"):
        run(place, "features", "--size", "huge")
    (place / "bare.md").write_text("no markers\n")
    with pytest.raises(InvalidRequest, match="study:features"):
        run(place, "features", "--page", str(place / "bare.md"))
