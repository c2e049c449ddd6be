"""The committed data is what its manifests say, fits its size limits, and belongs together."""

import hashlib
import io
import json
import runpy
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from byline.diffusion.model import directory_revision
from byline.rankings.snapshot import read_header, read_snapshot
from byline.teachers.curvature import Curvature
from byline.teachers.gradient_basis import FOLDER, MANIFEST, GradientBasis
from byline.teachers.sketch_set import SketchSet

DATA = Path(__file__).resolve().parents[2] / "data"
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return pq.read_table(DATA / "openclipart" / "items.parquet").to_pylist()


def test_the_corpus_is_what_its_manifest_says(rows: list[dict]) -> None:
    manifest = json.loads((DATA / "openclipart" / "MANIFEST.json").read_text())
    content = hashlib.sha256()
    for row in rows:
        content.update(json.dumps({k: v for k, v in row.items() if k != "image"}, sort_keys=True).encode())
    assert manifest["rows_sha256"] == content.hexdigest()
    assert manifest["items"] == len(rows) == len({row["item_id"] for row in rows})
    assert manifest["creators"] == len({row["creator"] for row in rows})
    assert manifest["near_duplicate_groups"] == len({row["near_duplicate_group"] for row in rows})


def test_every_image_is_public_domain_has_a_creator_and_its_own_digest(rows: list[dict]) -> None:
    unsuitable = runpy.run_path(str(DATA / "openclipart" / "build.py"))["UNSUITABLE"]
    for row in rows:
        assert row["licence"] == "public domain"
        assert row["creator"].strip() and "@" not in row["creator"]
        assert len(row["caption"]) >= 3 and not unsuitable.search(row["caption"])
        assert hashlib.sha256(row["image"]).hexdigest() == row["sha256"]
        with Image.open(io.BytesIO(row["image"])) as image:
            assert image.size == (64, 64) and image.format == "PNG"


def test_a_group_is_named_by_its_smallest_member(rows: list[dict]) -> None:
    smallest: dict[int, int] = {}
    for row in rows:
        group = row["near_duplicate_group"]
        smallest[group] = min(row["item_id"], smallest.get(group, row["item_id"]))
    assert all(group == item_id for group, item_id in smallest.items())


def test_what_was_dropped_is_listed_with_its_reason(rows: list[dict]) -> None:
    listed = (DATA / "openclipart" / "dropped.csv").read_text().splitlines()
    assert listed[0] == "source_path,reason" and len(listed) > 100
    assert not {row["source_path"] for row in rows} & {line.split(",")[0] for line in listed[1:]}


def test_data_keeps_within_its_size_limits() -> None:
    def size(folder: str, *patterns: str) -> int:
        return sum(f.stat().st_size for p in patterns for f in (DATA / folder).glob(p) if f.is_file())

    assert size("openclipart", "*") <= 25 * MEGABYTE
    assert size("generator", "unet/*", "vae/*", "scheduler/*", "*.json") <= 25 * MEGABYTE
    assert size("generator", "sketches/*") <= 60 * MEGABYTE
    assert size("generator", "gradient/*") <= 40 * MEGABYTE
    assert size("labels", "*.safetensors", "*.json") <= 15 * MEGABYTE


def test_labels_curvature_corpus_and_generator_belong_together(rows: list[dict]) -> None:
    revision = directory_revision(DATA / "generator")
    header, queries = read_snapshot(DATA / "labels")
    assert header.model_revision == revision
    assert header.teacher_id.startswith("abu_plus_linear+output_norm/") and revision in header.teacher_id
    assert Curvature.load(DATA / "generator" / "curvature", revision).model_revision == revision
    corpus = {row["item_id"] for row in rows}
    assert len(queries) >= 200
    assert all(set(query.item_ids.tolist()) == corpus for query in queries)


def test_sketches_are_of_this_corpus_and_teacher_and_near_the_first_order_ranking(rows: list[dict]) -> None:
    revision = directory_revision(DATA / "generator")
    sketches = SketchSet.load(DATA / "generator" / "sketches", revision)
    assert set(sketches.item_ids.tolist()) == {row["item_id"] for row in rows}
    assert sketches.teacher_id == read_header(DATA / "labels").teacher_id
    assert sketches.tokens is not None and sketches.tokens.item_ids.tolist() == sketches.item_ids.tolist()
    assert sketches.fidelity["token_map100"] >= 0.95 and sketches.fidelity["queries"] >= 20
    assert sketches.basis.fingerprint
    sketches.basis.require(Curvature.load(DATA / "generator" / "curvature", revision))


def test_the_gradient_basis_is_of_this_model_and_near_the_first_order_ranking() -> None:
    revision = directory_revision(DATA / "generator")
    folder = DATA / "generator" / FOLDER
    basis = GradientBasis.load(folder, revision)
    curvature = Curvature.load(DATA / "generator" / "curvature", revision)
    assert (basis.preconditioner, basis.fingerprint) == (curvature.name, curvature.fingerprint(basis.layers))
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["name"] == basis.name and basis.dimensions == 768
    assert manifest["fidelity"]["map100"] >= 0.85 and manifest["fidelity"]["queries"] >= 20


def test_no_prompt_group_is_in_two_splits() -> None:
    _, queries = read_snapshot(DATA / "labels")
    splits: dict[int, set[str]] = {}
    for query in queries:
        splits.setdefault(query.near_duplicate_group, set()).add(query.split)
    assert all(len(found) == 1 for found in splits.values())
    assert {split for found in splits.values() for split in found} == {"train", "validation", "test"}
