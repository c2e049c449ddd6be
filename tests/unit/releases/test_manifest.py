"""The manifest: nothing unusable is accepted, and every altered file is noticed."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from byline.errors import ReleaseCorrupt
from byline.releases.manifest import (
    REQUIRED_FILES,
    FileEntry,
    LabelSet,
    ReleaseManifest,
    file_entry,
    make_release_id,
    verify_files,
)

CREATED = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)


def manifest(directory: Path, release_id: str = "r1") -> ReleaseManifest:
    files: dict[str, FileEntry] = {}
    for name in REQUIRED_FILES:
        (directory / name).write_bytes(name.encode())
        files[name] = file_entry(directory / name)
    return ReleaseManifest(
        release_id=release_id, model_id="m", model_revision="rev", corpus_id="c", created_at=CREATED,
        feature_spec="minilm", preprocessing_hash="h", feature_dim=384, embedding_dim=8, items=3,
        index_factory="Flat", teacher_id="t", labels=LabelSet(queries=5, digest="d"), files=files,
    )  # fmt: skip


def test_a_manifest_survives_the_file_and_json(tmp_path: Path) -> None:
    written = manifest(tmp_path)
    written.write(tmp_path)
    assert ReleaseManifest.read(tmp_path) == written
    assert ReleaseManifest.from_json(json.loads(json.dumps(written.to_json()))).digest == written.digest


@pytest.mark.parametrize("name", REQUIRED_FILES)
def test_one_flipped_byte_in_any_file_is_noticed(tmp_path: Path, name: str) -> None:
    written = manifest(tmp_path)
    verify_files(tmp_path, written)
    data = bytearray((tmp_path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / name).write_bytes(bytes(data))
    with pytest.raises(ReleaseCorrupt, match=name):
        verify_files(tmp_path, written)
    (tmp_path / name).unlink()
    with pytest.raises(ReleaseCorrupt, match="missing"):
        verify_files(tmp_path, written)


@pytest.mark.parametrize(
    "change",
    [
        {"release_id": "../etc"},
        {"schema_version": 99},
        {"created_at": "2026-11-23T12:00:00"},
        {"items": 0},
        {"surprise": 1},
        {"files": {}},
        {"files": {"../head.safetensors": {"sha256": "0" * 64, "bytes": 1}}},
    ],
)
def test_an_unusable_manifest_names_the_field(tmp_path: Path, change: dict[str, object]) -> None:
    value = {**manifest(tmp_path).to_json(), **change}
    with pytest.raises(ReleaseCorrupt, match=next(iter(change))):
        ReleaseManifest.from_json(value)


def test_a_missing_or_broken_manifest_file_is_corrupt(tmp_path: Path) -> None:
    with pytest.raises(ReleaseCorrupt):
        ReleaseManifest.read(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ReleaseCorrupt):
        ReleaseManifest.read(tmp_path)


def test_release_ids_sort_by_time_and_differ_by_contents() -> None:
    later = CREATED.replace(hour=13)
    assert make_release_id(CREATED, "a") < make_release_id(later, "a")
    assert make_release_id(CREATED, "a") != make_release_id(CREATED, "b")
