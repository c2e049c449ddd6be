"""Bytes addressed by their sha256: corpus images, query images, generated images.

Why it exists: image bytes never travel in a message or a database row, only their digest does; and a
digest that was acknowledged must still lead to the whole bytes after a crash.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from byline.errors import BlobNotFound, InvalidRequest

_FLUSHES_AT_ONCE = 32
_DIGEST = re.compile(r"[0-9a-f]{64}")


def sha256_hex(data: bytes) -> str:
    """Lower-case hex sha256 of the bytes."""
    return hashlib.sha256(data).hexdigest()


def fsync_directory(directory: Path) -> None:
    """Make the names in a directory durable (a rename is only safe after this)."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class BlobStore:
    """Content-addressed files under ``root`` (``ab/abcdef…``). Safe for many processes on one file system."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self.root.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        """Where a blob lies, stored or not. InvalidRequest when it is not 64 lower-case hex digits."""
        if not _DIGEST.fullmatch(sha256):
            raise InvalidRequest("sha256", "must be 64 lower-case hexadecimal digits", value=sha256[:80])
        return self.root / sha256[:2] / sha256

    def exists(self, sha256: str) -> bool:
        """True when the blob is stored."""
        return self.path(sha256).is_file()

    def put(self, data: bytes) -> str:
        """Store the bytes durably and return their digest; storing the same bytes again only reads them."""
        return self.put_many([data])[0]

    def put_many(self, blobs: Sequence[bytes]) -> list[str]:
        """Store many blobs and return their digests; all are durable when it returns.

        A disk merges flushes that wait at the same time, and a directory is flushed once for all its new
        names: a thousand images take seconds where one by one they would take a minute. A stored file that no
        longer matches its digest is replaced, so uploading again heals what ``get`` reported as damaged.
        """
        digests = [sha256_hex(data) for data in blobs]
        with self._locked(fcntl.LOCK_SH):  # what is found stored here is not removed as unused before its row is there
            fresh = {d: data for d, data in zip(digests, blobs, strict=True) if not _intact(self.path(d), d, len(data))}
            for digest in set(digests) - set(fresh):
                self.touch(digest)
        if not fresh:
            return digests
        folders = {self.path(digest).parent for digest in fresh}
        made = [folder for folder in folders if not folder.is_dir()]
        for folder in made:
            folder.mkdir(parents=True, exist_ok=True)
        if len(fresh) == 1:
            ((digest, data),) = fresh.items()
            _write(self.path(digest), data)
            fsync_directory(self.path(digest).parent)
        else:
            with ThreadPoolExecutor(_FLUSHES_AT_ONCE) as pool:
                list(pool.map(_write, map(self.path, fresh), fresh.values()))
                list(pool.map(fsync_directory, folders))
        if made:
            fsync_directory(self.root)
        return digests

    def get(self, sha256: str) -> bytes:
        """The bytes of a blob. BlobNotFound when it is not stored, or when its file no longer matches its digest."""
        try:
            data = self.path(sha256).read_bytes()
        except FileNotFoundError as error:
            raise BlobNotFound(f"no image with sha256 {sha256} is stored; upload it first", sha256=sha256) from error
        if sha256_hex(data) != sha256:
            raise BlobNotFound(f"the stored file of {sha256} is damaged; upload it again", sha256=sha256)
        return data

    def touch(self, sha256: str) -> bool:
        """True when the blob is stored; it then counts as used now (see ``remove_unused``)."""
        try:
            os.utime(self.path(sha256))
        except FileNotFoundError:
            return False
        except PermissionError:  # another user's file: there, but its time stays
            return True
        return True

    def remove_unused(self, sha256: str, young_s: float, now: float | None = None) -> bool:
        """Delete a blob that no row leads to, unless it was stored or touched in the last ``young_s`` seconds (its row
        may be on its way). Whether it is gone. ``now`` in seconds since 1970."""
        path = self.path(sha256)
        with self._locked(fcntl.LOCK_EX):
            try:
                if path.stat().st_mtime > (time.time() if now is None else now) - young_s:
                    return False
                path.unlink()
            except FileNotFoundError:
                return True
        fsync_directory(path.parent)
        return True

    @contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        handle = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.flock(handle, how)
            yield
        finally:
            os.close(handle)

    def remove(self, sha256: str) -> bool:
        """Delete a blob's file for good; whether there was one. Only for who knows that nobody needs it any more."""
        path = self.path(sha256)
        try:
            path.unlink()
        except FileNotFoundError:
            return False
        fsync_directory(path.parent)
        return True


def _intact(path: Path, sha256: str, size: int) -> bool:
    """True when the file is there and holds the bytes of its name; read only if it has their size."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size == size and hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except FileNotFoundError:
        return False


def _write(target: Path, data: bytes) -> None:
    """Write beside the target, flush, rename: the name never leads to half of the bytes."""
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=".put-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o444)
        os.replace(name, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise
