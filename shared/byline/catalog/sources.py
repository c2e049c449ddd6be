"""The three shapes in which people keep a corpus, read as one stream of candidates.

Why it exists: Parquet, a folder with a table and a WebDataset tar differ only in where caption and bytes
lie. Each reader yields what it found, or what was wrong with that one entry; only a source that cannot be
read at all is an error (CorpusNotUsable).
"""

from __future__ import annotations

import csv
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from byline.catalog.sniff import MAX_BYTES
from byline.errors import CorpusNotUsable

_IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
_CAPTION_COLUMNS = ("caption", "text", "prompt", "title")
_FILE_COLUMNS = ("file_name", "file", "filename", "path", "image")
_CREATOR_COLUMNS = ("creator", "author", "artist")
_TABLES = (".csv", ".jsonl")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One entry of a source: its name there, the encoded image, and the fields beside it."""

    name: str
    image: bytes
    caption: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Broken:
    """An entry that cannot be used, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Source:
    """A stream of entries; ``total`` is None where only reading to the end would tell."""

    total: int | None
    entries: Iterator[Candidate | Broken]


def open_source(path: Path) -> Source:
    """Recognise a source by its name: ``.parquet``, ``.tar``/``.tar.gz``, a table or a folder holding one.

    CorpusNotUsable when it is none of these, lacks the needed columns, or cannot be opened.
    """
    if not path.exists():
        raise CorpusNotUsable(f"{path} does not exist", path=path)
    if path.is_dir():
        return _open_table(_table_of(path))
    if path.suffix == ".parquet":
        return _open_parquet(path)
    if path.name.endswith((".tar", ".tar.gz", ".tgz")):
        return _open_tar(path)
    if path.suffix in _TABLES:
        return _open_table(path)
    raise CorpusNotUsable(
        f"{path} is not a source: give a .parquet, a .tar, or a folder with a .csv or .jsonl table", path=path
    )


# -- Parquet ------------------------------------------------------------------------------------


def _open_parquet(path: Path) -> Source:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise CorpusNotUsable(f"{path} cannot be read as Parquet", path=path) from error
    names = set(file.schema_arrow.names)
    if "image" not in names or not names & set(_CAPTION_COLUMNS):
        raise CorpusNotUsable(
            f"{path} needs image and one of {', '.join(_CAPTION_COLUMNS)}; it has {', '.join(sorted(names))}",
            path=path,
        )
    return Source(file.metadata.num_rows, _parquet_rows(file))


def _parquet_rows(file: Any) -> Iterator[Candidate | Broken]:
    number = 0
    for batch in file.iter_batches(batch_size=128):
        for row in batch.to_pylist():
            name = str(row.get("source_path") or f"row {number}")
            number += 1
            image = row.pop("image")
            if isinstance(image, dict):  # the layout of Hugging Face data sets: {bytes, path}
                name = str(image.get("path") or name)
                image = image.get("bytes")
            if isinstance(image, bytes) and image:
                yield Candidate(name, image, _first(row, _CAPTION_COLUMNS), row)
            else:
                yield Broken(name, "no image bytes")


# -- a folder with a table ----------------------------------------------------------------------


def _table_of(folder: Path) -> Path:
    tables = sorted(p for p in folder.iterdir() if p.suffix in _TABLES)
    if len(tables) != 1:
        found = ", ".join(p.name for p in tables) or "none"
        raise CorpusNotUsable(f"{folder} must hold exactly one .csv or .jsonl table; found: {found}", path=folder)
    return tables[0]


def _open_table(table: Path) -> Source:
    try:
        text = table.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusNotUsable(f"{table} cannot be read as UTF-8 text", path=table) from error
    rows = _csv_rows(text) if table.suffix == ".csv" else _jsonl_rows(text)
    if not rows:
        raise CorpusNotUsable(f"{table} has no rows", path=table)
    usable = [row for row in rows if isinstance(row, dict)]
    if not any(_first(row, _FILE_COLUMNS) for row in usable):
        raise CorpusNotUsable(f"{table} needs one of the columns {', '.join(_FILE_COLUMNS)}", path=table)
    return Source(len(rows), _table_entries(table, rows))


def _csv_rows(text: str) -> list[dict[str, Any] | Broken]:
    return list(csv.DictReader(text.splitlines()))


def _jsonl_rows(text: str) -> list[dict[str, Any] | Broken]:
    rows: list[dict[str, Any] | Broken] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        rows.append(value if isinstance(value, dict) else Broken(f"line {number}", "not a JSON object"))
    return rows


def _table_entries(table: Path, rows: list[dict[str, Any] | Broken]) -> Iterator[Candidate | Broken]:
    root = table.parent.resolve()
    for number, row in enumerate(rows, start=1):
        if isinstance(row, Broken):
            yield row
            continue
        name = _first(row, _FILE_COLUMNS)
        path = (root / name).resolve()
        if not name:
            yield Broken(f"row {number}", "names no file")
        elif not path.is_relative_to(root):
            yield Broken(name, "lies outside the folder")
        elif not path.is_file():
            yield Broken(name, "no such file")
        elif path.stat().st_size > MAX_BYTES:
            yield Broken(name, f"larger than {MAX_BYTES} bytes")
        else:
            fields = {k: v for k, v in row.items() if k not in _FILE_COLUMNS}
            yield Candidate(name, path.read_bytes(), _first(row, _CAPTION_COLUMNS), fields)


# -- WebDataset tar -----------------------------------------------------------------------------


def _open_tar(path: Path) -> Source:
    try:
        archive = tarfile.open(path, "r:*")  # noqa: SIM115 - closed by the generator
    except (tarfile.TarError, OSError, EOFError) as error:
        raise CorpusNotUsable(f"{path} cannot be read as a tar archive", path=path) from error
    return Source(None, _tar_samples(archive, path.name))


def _tar_samples(archive: tarfile.TarFile, archive_name: str) -> Iterator[Candidate | Broken]:
    """Consecutive members with the same name up to the first dot are one sample."""
    key = ""
    parts: dict[str, bytes | None] = {}
    try:
        with archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                sample = f"{folder}/{stem}" if folder else stem
                if sample != key and parts:
                    yield _sample(key, parts)
                    parts = {}
                key = sample
                stream = archive.extractfile(member)
                if stream is not None:
                    parts["." + suffix.lower()] = _bounded(stream)
    except (tarfile.TarError, OSError, EOFError) as error:
        yield Broken(archive_name, f"the archive is cut short or damaged after {key or 'its start'} ({error})")
    if parts:
        yield _sample(key, parts)


def _bounded(stream: IO[bytes]) -> bytes | None:
    data = stream.read(MAX_BYTES + 1)
    return data if len(data) <= MAX_BYTES else None


def _sample(key: str, parts: Mapping[str, bytes | None]) -> Candidate | Broken:
    suffix = next((s for s in parts if s in _IMAGE_SUFFIXES), None)
    if suffix is None:
        return Broken(key, "no .png, .jpg or .webp member")
    image = parts[suffix]
    if image is None:
        return Broken(key + suffix, f"larger than {MAX_BYTES} bytes")
    try:
        fields = json.loads(parts.get(".json") or b"{}")
        caption = (parts.get(".txt") or b"").decode().strip()
    except ValueError:
        return Broken(key + suffix, "its .json or .txt member is damaged")
    if not isinstance(fields, dict):
        return Broken(key + suffix, "its .json member is not an object")
    return Candidate(key + suffix, image, caption or _first(fields, _CAPTION_COLUMNS), fields)


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The first of these columns that holds text."""
    return next((str(row[n]).strip() for n in names if isinstance(row.get(n), str) and row[n].strip()), "")


def creator_of(fields: Mapping[str, Any]) -> str:
    """The creator under any of its usual column names; empty when not stated."""
    return _first(fields, _CREATOR_COLUMNS)
