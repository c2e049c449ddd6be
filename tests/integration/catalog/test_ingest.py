"""Ingest on a real Postgres: three kinds of source, broken entries, and running again."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sqlalchemy import Engine

from byline.catalog.blobs import BlobStore, sha256_hex
from byline.catalog.ingest import ingest
from byline.catalog.store import CatalogStore
from byline.db.session import make_engine
from byline.errors import CorpusNotUsable

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = make_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def folder_with_table(folder: Path, count: int) -> Path:
    folder.mkdir()
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "caption", "creator", "keywords"])
        for n in range(count):
            (folder / f"{n}.png").write_bytes(png(n))
            writer.writerow([f"{n}.png", f"picture {n}", "Ada", "round; red, round"])
    return folder


def add_rows(table: Path, *rows: str) -> None:
    table.write_text(table.read_text() + "\n".join(rows) + "\n")


def test_running_again_adds_only_what_is_new(engine: Engine, blobs: BlobStore, tmp_path: Path) -> None:
    folder = folder_with_table(tmp_path / "images", 5)
    first = ingest(engine, blobs, folder, "clips")
    assert (first.added, first.unchanged, first.skipped) == (5, 0, ())
    (folder / "new.png").write_bytes(png(99))
    add_rows(folder / "table.csv", "new.png,a new one,Bo,")
    second = ingest(engine, blobs, folder, "clips")
    assert (second.added, second.unchanged, second.skipped) == (1, 5, ())
    items = CatalogStore(engine).items("clips")
    assert len(items) == 6
    assert all(blobs.get(item.image_sha256) for item in items)
    assert {item.keywords for item in items} == {("round", "red"), ()}
    assert all(item.near_duplicate_group == item.item_id for item in items)


def test_a_broken_entry_is_skipped_counted_and_listed_and_never_fatal(
    engine: Engine, blobs: BlobStore, tmp_path: Path
) -> None:
    folder = folder_with_table(tmp_path / "images", 3)
    (folder / "broken.png").write_bytes(png(50)[:60])
    (folder / "text.png").write_bytes(b"not an image")
    (folder / "silent.png").write_bytes(png(51))
    (tmp_path / "secret.png").write_bytes(png(52))
    add_rows(
        folder / "table.csv", "broken.png,cut short,,", "text.png,text,,", "silent.png,,,", "absent.png,gone,,",
        "../secret.png,outside,,", "0.png,the same bytes,,",
    )  # fmt: skip
    report = ingest(engine, blobs, folder, "clips")
    assert report.added == 3
    reasons = dict(report.skipped)
    assert set(reasons) == {"broken.png", "text.png", "silent.png", "absent.png", "../secret.png", "0.png"}
    assert "outside" in reasons["../secret.png"]
    assert "0.png" in reasons["0.png"]


def test_a_parquet_with_ids_groups_and_digests_is_taken_as_stated(
    engine: Engine, blobs: BlobStore, tmp_path: Path
) -> None:
    images = [png(n) for n in range(4)]
    table = pa.table(
        {
            "item_id": [11, 12, 13, 14],
            "caption": ["a", "b", "c", "d"],
            "keywords": [["x"], [], ["y", "z"], None],
            "creator": ["Ada"] * 4,
            "licence": ["public domain"] * 4,
            "source": ["s"] * 4,
            "source_path": ["a.png", "b.png", "c.png", "d.png"],
            "sha256": [sha256_hex(images[0]), sha256_hex(images[1]), "0" * 64, sha256_hex(images[3])],
            "near_duplicate_group": [11, 11, 13, 14],
            "image": images,
        }
    )
    pq.write_table(table, tmp_path / "items.parquet")
    seen: list[tuple[int, int | None]] = []
    report = ingest(engine, blobs, tmp_path / "items.parquet", "clips", lambda done, total: seen.append((done, total)))
    assert (report.added, [name for name, _ in report.skipped]) == (3, ["c.png"])
    assert seen[-1] == (4, 4)
    items = {item.item_id: item for item in CatalogStore(engine).items("clips")}
    assert items[12].near_duplicate_group == 11
    assert items[11].keywords == ("x",)
    taken = ingest(engine, blobs, tmp_path / "items.parquet", "another")
    assert (taken.added, len(taken.skipped)) == (0, 4)


def test_the_hugging_face_layout_of_parquet_is_read(engine: Engine, blobs: BlobStore, tmp_path: Path) -> None:
    table = pa.table({"image": [{"bytes": png(1), "path": "one.png"}, {"bytes": None, "path": "two.png"}],
                      "text": ["one", "two"]})  # fmt: skip
    pq.write_table(table, tmp_path / "train.parquet")
    report = ingest(engine, blobs, tmp_path / "train.parquet", "clips")
    assert (report.added, report.skipped) == (1, (("two.png", "no image bytes"),))


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_a_webdataset_tar_is_read_and_a_cut_one_as_far_as_it_goes(
    engine: Engine, blobs: BlobStore, tmp_path: Path
) -> None:
    members = []
    for n in range(3):
        members += [(f"x/{n:03}.png", png(n)), (f"x/{n:03}.json", json.dumps({"caption": f"p {n}"}).encode())]
    members += [("x/100.txt", b"no image"), ("x/101.png", png(101)), ("x/101.txt", b"from text")]
    write_tar(tmp_path / "a.tar", members)
    report = ingest(engine, blobs, tmp_path / "a.tar", "clips")
    assert (report.added, report.skipped) == (4, (("x/100", "no .png, .jpg or .webp member"),))
    assert "from text" in {item.caption for item in CatalogStore(engine).items("clips")}
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:1700])
    cut = ingest(engine, blobs, tmp_path / "cut.tar", "cut")
    assert cut.added >= 1
    assert cut.skipped


@pytest.mark.parametrize("name", ["absent", "a.tar", "a.parquet", "a.zip", "empty"])
def test_a_source_that_cannot_be_read_at_all_is_one_typed_error(
    engine: Engine, blobs: BlobStore, tmp_path: Path, name: str
) -> None:
    if name == "empty":
        (tmp_path / name).mkdir()
    elif name != "absent":
        (tmp_path / name).write_bytes(b"neither this nor that")
    with pytest.raises(CorpusNotUsable):
        ingest(engine, blobs, tmp_path / name, "clips")


def test_the_demo_corpus_goes_in_whole(engine: Engine, blobs: BlobStore) -> None:
    source = REPOSITORY / "data" / "openclipart" / "items.parquet"
    report = ingest(engine, blobs, source, "openclipart")
    assert (report.added, report.unchanged, report.skipped) == (pq.read_metadata(source).num_rows, 0, ())
    again = ingest(engine, blobs, source, "openclipart")
    assert (again.added, again.unchanged) == (0, report.added)
