"""``byline evaluate lds`` and ``counterfactual`` end to end on a tiny study, twice: the second time trains nothing."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from byline.cli.evaluate import app
from byline.diffusion.tiny import write_tiny_pipeline
from byline.errors import LabelsNotUsable

REFERENCE = "abu_plus_linear all 0.1 sum"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(24):
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(out, "PNG")
        pictures.append(out.getvalue())
    captions = [f"cat {n}" for n in range(24)]
    table = pa.table({"item_id": list(range(24)), "caption": captions, "image": pictures})
    pq.write_table(table, tmp_path / "i.parquet")
    write_tiny_pipeline(tmp_path / "model", channels=8)
    monkeypatch.setenv("BYLINE_CORPUS_SOURCE", str(tmp_path / "i.parquet"))
    monkeypatch.setenv("BYLINE_MODEL_DIRECTORY", str(tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments, "--size", "tiny", "--work", "work"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_both_commands_leave_tables_and_rows_and_do_not_repeat_work(place: Path) -> None:
    teachers = "abu_plus_linear,similarity:pixels,similarity:clip_b16_of_nobody"
    shown = run("lds", "--halves", "4", "--teachers", teachers, "--reference", REFERENCE, "--no-head",
                "--forms", "sum")  # fmt: skip
    assert "4 half-corpus retrainings" in shown
    found = json.loads(Path("reports/evaluate/lds.json").read_text())
    assert {r["variant"] for r in found["variants"]} > {REFERENCE, "similarity:pixels", "random", "caption words"}
    assert len(found["rows"]) == 4
    assert list(found["skipped"]) == ["similarity:clip_b16_of_nobody"]
    assert found["reference"] == REFERENCE

    arguments = ("counterfactual", "--methods", f"random,{REFERENCE}", "--nothing", "2", "--arms", "2")
    run(*arguments)
    first = json.loads(Path("reports/evaluate/counterfactual.json").read_text())
    assert {(r["method"], r["k"]) for r in first["rows"]} == {("random", 1), (REFERENCE, 1)}
    assert len(first["rows_of_retrainings"]) == first["retrainings"] == 4
    rows = next(Path("work").glob("*/*/rows.jsonl"))
    before = rows.read_bytes()
    run(*arguments)
    again = json.loads(Path("reports/evaluate/counterfactual.json").read_text())
    assert again["rows"] == first["rows"]
    assert rows.read_bytes() == before


def test_judging_before_there_are_retrainings_says_what_to_do(place: Path) -> None:
    with pytest.raises(LabelsNotUsable, match="at least 3"):
        run("lds", "--no-training", "--halves", "3", "--teachers", "", "--no-head")
    with pytest.raises(LabelsNotUsable, match="choose one of cpu"):
        CliRunner().invoke(app, ["lds", "--size", "huge"], catch_exceptions=False)
