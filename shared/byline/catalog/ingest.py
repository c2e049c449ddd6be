"""Bring a corpus in: every image checked, stored by digest, then its row.

Why it exists: corpora come from people, so some files are broken. One broken image is skipped, counted and
named; the rest goes in. Bytes are durable before the row that names them, and running the same source
again adds only what is new, so an interrupted ingest is simply run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from byline.catalog.blobs import BlobStore, sha256_hex
from byline.catalog.items import ITEM_ID_MASK, Item, derive_item_id
from byline.catalog.look import Look, look_of
from byline.catalog.sources import Broken, Candidate, creator_of, open_source
from byline.catalog.store import CatalogStore
from byline.errors import ImageTooLarge, ImageUndecodable
from byline.security.decoding import decode_untrusted

_BATCH = 512
_MAX_CAPTION = 4_000

Progress = Callable[[int, int | None], None]
"""Called with (entries done, entries in all or None)."""


def no_progress(done: int, total: int | None) -> None:
    """Say nothing."""


@dataclass(frozen=True, slots=True)
class IngestReport:
    """What an ingest did: counts of new and known items, and every skipped entry with its reason."""

    corpus_id: str
    added: int
    unchanged: int
    skipped: tuple[tuple[str, str], ...]


class _SkippedError(Exception):
    """Ends the work on one entry; the message is the reason."""


@dataclass(slots=True)
class _Progress:
    added: int = 0
    unchanged: int = 0
    done: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)


def ingest(
    engine: Engine, blobs: BlobStore, source: Path, corpus_id: str, progress: Progress = no_progress
) -> IngestReport:
    """Add the images of a Parquet file, folder with table, or WebDataset tar to a corpus.

    CorpusNotUsable when the source cannot be read at all. Existing items are never changed.
    """
    opened = open_source(source)
    store = CatalogStore(engine)
    store.add_corpus(corpus_id)
    state = _Progress()
    for batch in _batched(opened.entries, _BATCH):
        _ingest_batch(store, blobs, corpus_id, batch, state)
        state.done += len(batch)
        progress(state.done, opened.total)
    return IngestReport(corpus_id, state.added, state.unchanged, tuple(state.skipped))


def _ingest_batch(
    store: CatalogStore, blobs: BlobStore, corpus_id: str, batch: list[Candidate | Broken], state: _Progress
) -> None:
    read: list[tuple[Candidate, Item]] = []
    for entry in batch:
        if isinstance(entry, Broken):
            state.skipped.append((entry.name, entry.reason))
            continue
        try:
            item = _to_item(entry, corpus_id)
            if item.item_id in state.names:
                raise _SkippedError(f"the same item as {state.names[item.item_id]}")
        except _SkippedError as skip:
            state.skipped.append((entry.name, str(skip)))
            continue
        state.names[item.item_id] = entry.name
        read.append((entry, item))
    known = store.known(corpus_id, [item.item_id for _, item in read])
    fresh: list[Item] = []
    looks: dict[int, Look] = {}
    stated: set[int] = set()
    images: list[bytes] = []
    withdrawn = store.withdrawn(corpus_id)
    names = {item.item_id: entry.name for entry, item in read}
    for entry, item in read:
        try:
            if item.item_id in withdrawn:
                raise _SkippedError("it was withdrawn")
            if item.item_id not in known:
                looks[item.item_id] = _look(entry.image)
                fresh.append(item)
                if entry.fields.get("near_duplicate_group") not in (None, ""):
                    stated.add(item.item_id)
            elif known[item.item_id] == item.image_sha256:
                state.unchanged += 1
            else:
                raise _SkippedError(f"id {item.item_id} belongs to another image already")
        except _SkippedError as skip:
            state.skipped.append((entry.name, str(skip)))
        else:
            images.append(entry.image)  # a known item's too: heals a lost file, costs one stat otherwise
    refused = store.refusals(corpus_id, fresh)
    refused_images = {item.image_sha256 for item in fresh if item.item_id in refused}
    blobs.put_many([image for image in images if not refused_images or sha256_hex(image) not in refused_images])
    inserted = store.add_items(corpus_id, fresh, looks, stated)
    state.added += len(inserted.added)
    state.unchanged += len(fresh) - len(inserted.added) - len(inserted.conflicting) - len(inserted.refused)
    state.skipped.extend((names[i], reason) for i, reason in sorted(inserted.refused.items()))
    state.skipped.extend((names[i], f"id {i} belongs to another image already") for i in sorted(inserted.conflicting))


def _look(data: bytes) -> Look:
    try:
        return look_of(decode_untrusted(data))
    except (ImageUndecodable, ImageTooLarge) as error:
        raise _SkippedError(error.message) from error


def _to_item(entry: Candidate, corpus_id: str) -> Item:
    fields = entry.fields
    digest = sha256_hex(entry.image)
    declared = _text(fields, "sha256")
    if declared and declared.lower() != digest:
        raise _SkippedError("its sha256 is not the stated one")
    if not entry.caption:
        raise _SkippedError("no caption")
    if len(entry.caption) > _MAX_CAPTION or "\x00" in entry.caption:
        raise _SkippedError(f"the caption is longer than {_MAX_CAPTION} characters or not text")
    item_id = _integer(fields, "item_id")
    group = _integer(fields, "near_duplicate_group")
    return Item(
        item_id=derive_item_id(corpus_id, digest) if item_id is None else item_id,
        caption=entry.caption,
        keywords=_keywords(fields.get("keywords")),
        creator=creator_of(fields),
        licence=_text(fields, "licence") or _text(fields, "license"),
        source=_text(fields, "source"),
        source_path=_text(fields, "source_path") or entry.name,
        image_sha256=digest,
        near_duplicate_group=-1 if group is None else group,
    )


def _integer(fields: Mapping[str, Any], name: str) -> int | None:
    value = fields.get(name)
    if value is None or value == "":
        return None
    try:
        number = int(value)
    except (TypeError, ValueError) as error:
        raise _SkippedError(f"{name} is not a whole number") from error
    if not 0 <= number <= ITEM_ID_MASK:
        raise _SkippedError(f"{name} is outside 0 … 2^63-1")
    return number


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    return value.replace("\x00", "").strip() if isinstance(value, str) else ""


def _keywords(value: Any) -> tuple[str, ...]:
    """A list of words, or words separated by commas or semicolons."""
    if isinstance(value, str):
        value = value.replace(";", ",").split(",")
    if not isinstance(value, list):
        return ()
    return tuple(dict.fromkeys(str(word).replace("\x00", "").strip() for word in value if str(word).strip()))


def _batched(entries: Iterable[Candidate | Broken], size: int) -> Iterator[list[Candidate | Broken]]:
    iterator = iter(entries)
    while batch := list(islice(iterator, size)):
        yield batch
