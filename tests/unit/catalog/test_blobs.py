"""Blobs: an acknowledged digest leads to the whole bytes, and to nothing else."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from byline.catalog.blobs import BlobStore, sha256_hex
from byline.errors import BlobNotFound, InvalidRequest


def test_what_was_put_can_be_read_by_its_digest(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs")
    digest = store.put(b"picture")
    assert digest == sha256_hex(b"picture")
    assert store.put(b"picture") == digest
    assert BlobStore(tmp_path / "blobs").get(digest) == b"picture"
    assert store.exists(digest)


def test_an_unknown_or_damaged_blob_is_not_found(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    with pytest.raises(BlobNotFound):
        store.get("0" * 64)
    digest = store.put(b"picture")
    store.path(digest).chmod(0o644)
    store.path(digest).write_bytes(b"pictura")
    with pytest.raises(BlobNotFound):
        store.get(digest)


@pytest.mark.parametrize("damaged", [b"pictura", b"pic", b""])
def test_putting_the_bytes_again_heals_a_damaged_blob(tmp_path: Path, damaged: bytes) -> None:
    store = BlobStore(tmp_path)
    digest, other = store.put_many([b"picture", b"other"])
    whole = store.path(other).stat().st_ino
    store.path(digest).chmod(0o644)
    store.path(digest).write_bytes(damaged)
    assert store.put_many([b"picture", b"other"]) == [digest, other]
    assert store.get(digest) == b"picture"
    assert store.path(other).stat().st_ino == whole, "a blob that is whole is left alone"


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "AB" * 32, "0" * 63])
def test_only_a_digest_names_a_blob(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest):
        BlobStore(tmp_path).path(name)


def test_concurrent_writers_of_the_same_bytes_leave_one_whole_file(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    data = bytes(range(256)) * 400
    start = threading.Barrier(8)

    def write() -> None:
        start.wait(timeout=10)
        store.put(data)

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert store.get(sha256_hex(data)) == data
    assert len([p for p in tmp_path.rglob("*") if p.is_file()]) == 1
