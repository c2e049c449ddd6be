"""``byline corpus`` on a real Postgres: what an operator types, and what comes back."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from byline.cli.corpus import app
from byline.errors import CorpusNotUsable, InvalidRequest


@pytest.fixture
def images(tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BYLINE_DATABASE_URL", database_url)
    monkeypatch.setenv("BYLINE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("BYLINE_CORPUS_ID", "clips")
    folder = tmp_path / "images"
    folder.mkdir()
    rows = []
    for n in range(3):
        buffer = io.BytesIO()
        pixels = np.random.default_rng(n).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        (folder / f"{n}.png").write_bytes(buffer.getvalue())
        rows.append(json.dumps({"file_name": f"{n}.png", "caption": f"a [red] cat {n}", "creator": "Ada"}))
    (folder / "bad.png").write_bytes(b"bad")
    rows.append(json.dumps({"file_name": "bad.png", "caption": "bad"}))
    (folder / "items.jsonl").write_text("\n".join(rows))
    return folder


def test_ingest_list_show_and_withdraw(images: Path, tmp_path: Path) -> None:
    run = CliRunner()
    skipped = tmp_path / "skipped.csv"
    first = run.invoke(app, ["ingest", str(images), "--skipped", str(skipped)], catch_exceptions=False)
    assert "clips: 3 added, 0 there already, 1 skipped" in first.output
    assert "bad.png" in skipped.read_text()
    again = run.invoke(app, ["ingest", str(images)], catch_exceptions=False)
    assert "clips: 0 added, 3 there already, 1 skipped" in again.output

    listed = json.loads(run.invoke(app, ["list", "--json"], catch_exceptions=False).output)
    assert [item["creator"] for item in listed] == ["Ada"] * 3
    table = run.invoke(app, ["list", "--search", "CAT 1"], catch_exceptions=False).output
    assert "a [red] cat 1" in table
    assert "1 of 1 items" in table

    item_id = listed[0]["item_id"]
    out = tmp_path / "out.png"
    shown = run.invoke(app, ["show", item_id, "--json", "--image", str(out)], catch_exceptions=False)
    assert json.loads(shown.output)["caption"] == listed[0]["caption"]
    assert out.read_bytes().startswith(b"\x89PNG")
    assert listed[0]["caption"] in run.invoke(app, ["show", item_id], catch_exceptions=False).output

    refused = run.invoke(app, ["withdraw", item_id], input="n\n")
    assert refused.exit_code != 0
    receipt = json.loads(run.invoke(app, ["withdraw", item_id, "7", "--yes", "--json"], catch_exceptions=False).output)
    assert (receipt["withdrawn"], receipt["unknown"]) == ([item_id], ["7"])
    assert "1 withdrawn before" in run.invoke(app, ["withdraw", item_id, "--yes"], catch_exceptions=False).output
    assert len(json.loads(run.invoke(app, ["list", "--json"], catch_exceptions=False).output)) == 2


def test_what_does_not_exist_is_a_typed_error(images: Path, tmp_path: Path) -> None:
    assert isinstance(CliRunner().invoke(app, ["show", "12345"]).exception, InvalidRequest)
    assert isinstance(CliRunner().invoke(app, ["ingest", str(tmp_path / "absent")]).exception, CorpusNotUsable)


def test_a_creators_withdrawal_has_a_receipt_that_can_be_checked(images: Path, tmp_path: Path) -> None:
    run = CliRunner()
    run.invoke(app, ["ingest", str(images)], catch_exceptions=False)
    withdrawn = run.invoke(
        app, ["withdraw", "--creator", "Ada", "--reason", "asked by mail", "--yes", "--json"], catch_exceptions=False
    )
    told = json.loads(withdrawn.output)
    assert len(told["withdrawn"]) == 3
    (receipt,) = told["receipts"]
    early = run.invoke(app, ["receipt", receipt, "--verify"])
    assert early.exit_code == 1 and "NOT absent" in early.output and "images: 3 found" in early.output
    printed = run.invoke(app, ["purge", "--json"], catch_exceptions=False).output
    purged = json.loads(printed[printed.index("{\n"):])  # behind a line of the log, which a test has not configured
    assert purged["done"] and purged["blobs"] == 3
    late = run.invoke(app, ["receipt", receipt, "--verify", "--json"], catch_exceptions=False)
    kept = json.loads(late.output)
    assert late.exit_code == 0 and kept["absence"]["absent"]
    assert kept["criterion"] == {"creator": "Ada"} and kept["reason"] == "asked by mail" and kept["purged_at"]
    assert list((tmp_path / "state" / "blobs").rglob("*.png")) == []
    again = run.invoke(app, ["ingest", str(images)], catch_exceptions=False)
    assert "clips: 0 added, 0 there already, 4 skipped" in again.output
    stored = [path for path in (tmp_path / "state" / "blobs").rglob("*") if path.is_file()]
    assert stored == []
