"""``byline evaluate teacher`` end to end on a tiny model: the gate, its resumption, and the comparison of teachers."""

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
from typer.testing import CliRunner, Result

from byline.cli.evaluate import app
from byline.diffusion.model import DiffusionModel
from byline.diffusion.tiny import write_tiny_pipeline
from byline.errors import InvalidRequest, LabelsNotUsable
from byline.evaluation.corpus_file import read_corpus
from byline.rankings.snapshot import SnapshotHeader, SnapshotQuery, write_snapshot
from byline.teachers.item_losses import ItemLosses
from byline.teachers.registry import ensure_curvature

ITEMS = 112


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a corpus and labels of three queries, as a checkout has them."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("evaluate")
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(ITEMS + 3):
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(out, "PNG")
        pictures.append(out.getvalue())
    ids = np.arange(1000, 1000 + ITEMS)
    captions = [f"a red cat w{n % 90}" for n in range(ITEMS)]
    pq.write_table(pa.table({"item_id": ids, "caption": captions, "image": pictures[:ITEMS]}), place / "items.parquet")
    model = DiffusionModel.load(write_tiny_pipeline(place / "model", channels=8))
    ensure_curvature(model, read_corpus(place / "items.parquet"), place / "model" / "curvature", samples=256)
    tau = rng.standard_normal((3, ITEMS)).astype(np.float32)
    queries = [
        SnapshotQuery(prompt=f"a blue dog w{n}", seed=n, split=split, near_duplicate_group=n, source="corpus",
                      candidate_set="corpus", draws=8, image=pictures[ITEMS + n], item_ids=ids, tau=tau[n],
                      standard_error=tau[n], tau_halves=None)
        for n, split in enumerate(("train", "test", "test"))
    ]  # fmt: skip
    write_snapshot(place / "labels", SnapshotHeader("m", "r", "c", "t"), queries)
    return place


def evaluate(place: Path, *arguments: str, out: str = "teacher.json") -> tuple[Result, dict]:
    options = {
        "--model": place / "model", "--corpus": place / "items.parquet", "--labels": place / "labels",
        "--cache": place / "cache", "--work": place / "work", "--out": place / out, "--queries": 2,
        "--candidates": 106, "--draws": 8, "--query-draws": 32, "--decade-queries": 1, "--decade-candidates": 10,
    }  # fmt: skip
    for option, value in zip(arguments[::2], arguments[1::2], strict=True):
        options[option] = value
    result = CliRunner().invoke(app, ["teacher", *(str(part) for pair in options.items() for part in pair)])
    document = place / str(out)
    return result, json.loads(document.read_text()) if result.exit_code == 0 else {}


@pytest.fixture(scope="module")
def gate(place: Path) -> dict:
    result, document = evaluate(place)
    assert result.exit_code == 0, result.output
    assert ("PASSED" in result.output) and document["decision"]["why"] in result.output.replace("\n", " ")
    return document


def test_the_gate_has_the_names_everyone_compares(gate: dict) -> None:
    for name in ("gate", "self", "cross"):
        assert set(gate[name]) == {"spearman", "overlap20", "overlap100", "standard_error"}
    assert gate["gate"]["spearman"] > 0.9, "the first order agrees with the exact form under the same noise"
    assert gate["gate"]["spearman"] > gate["self"]["spearman"], "other noise is the larger difference with 8 draws"
    assert len(gate["rows"]) == 2 and {"command", "machine", "seconds", "commit", "seed"} <= set(gate)
    held_out_first = {row["query"] for row in gate["rows"]}
    assert held_out_first == {1, 2}


def test_steps_agree_in_the_linear_regime(gate: dict) -> None:
    decades = {row["decade"]: row for row in gate["decades"]}
    assert sorted(decades) == [-2, -1, 0, 1, 2]
    assert decades[-2]["spearman"] > 0.95
    assert 0.95 < decades[-2]["slope"] < 1.05
    assert abs(decades[2]["slope"]) < 0.5, "a hundred samples' worth is not linear"
    assert decades[-2]["lost"] > decades[2]["lost"], "the smaller the step, the more of it rounding takes"


def test_the_figure_is_drawn(gate: dict, place: Path) -> None:
    assert (place / "teacher.png").stat().st_size > 1000


def test_a_second_run_scores_nothing_and_says_the_same(
    gate: dict, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a row that is there was made again")

    monkeypatch.setattr(ItemLosses, "measure", refuse)
    result, again = evaluate(place, out="again.json")
    assert result.exit_code == 0, result.output
    for name in ("gate", "self", "cross", "rows", "decades", "decision"):
        assert again[name] == gate[name]


def test_other_settings_do_not_reuse_rows(gate: dict, place: Path) -> None:
    result, other = evaluate(place, "--damping", "1.0", "--decade-queries", "0", out="other.json")
    assert result.exit_code == 0, result.output
    assert other["rows"] != gate["rows"] and other["decades"] == []


def test_any_teachers_are_compared_pairwise(gate: dict, place: Path) -> None:
    names = "abu_plus_linear,gradient_linear,similarity:pixels"
    result, document = evaluate(place, "--teachers", names, out="compare.json")
    assert result.exit_code == 0, result.output
    assert [(row["one"], row["two"]) for row in document["rows"]] == [
        ("abu_plus_linear", "gradient_linear"), ("abu_plus_linear", "similarity:pixels"),
        ("gradient_linear", "similarity:pixels"),
    ]  # fmt: skip
    related, unrelated = document["rows"][0]["spearman"], document["rows"][1]["spearman"]
    assert related > unrelated
    assert set(document["seconds_per_query"]) == set(names.split(","))


@pytest.mark.parametrize(
    ("option", "value"), [("--teachers", "abu_plus"), ("--teachers", "abu_minus,trak"), ("--layers", "best"),
                          ("--noise", "none"), ("--aggregation", "max")],
)  # fmt: skip
def test_a_wrong_choice_is_named(place: Path, option: str, value: str) -> None:
    result, _ = evaluate(place, option, value)
    assert isinstance(result.exception, InvalidRequest) and result.exception.field == option


def test_more_queries_than_there_are_labels_are_refused(place: Path) -> None:
    result, _ = evaluate(place, "--queries", "9")
    assert isinstance(result.exception, LabelsNotUsable) and "--queries" in result.exception.message
