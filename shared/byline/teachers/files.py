"""Where the things teachers are fitted on lie: beside the model they came with, or in this machine's cache.

Why it exists: curvature, sketches and projected gradients take minutes to hours to fit and seconds to load; a
worker must find what was shipped with the model, never write into it, and never take what was fitted on an
earlier checkpoint for this one's.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from byline.errors import TeacherNotUsable

MANIFEST = "manifest.json"
PUBLISHED_SELECTION = "cross_attention_kv"
SKETCHES = "sketches"


def curvature_name(selection: str) -> str:
    """Folder of the EK-FAC factors of a layer selection; the published one has the plain name."""
    return "curvature" if selection == PUBLISHED_SELECTION else f"curvature-{selection}"


def fisher_name(selection: str) -> str:
    """Folder of the diagonal Fisher of a layer selection."""
    return f"fisher-{selection}"


def is_fitted(directory: Path, revision: str) -> bool:
    """Whether ``directory`` holds a finished fit of this model revision (and not of an earlier checkpoint)."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("model_revision") == revision


@dataclass(frozen=True)
class TeacherFiles:
    """Two places for folders of fitted things: ``shipped`` (read only, the model's directory) and ``cache``.

    What a model came with wins over what was fitted here, so that machines which share a model agree.
    """

    cache: Path
    shipped: Path | None = None

    @classmethod
    def beside(cls, model_directory: Path, cache_dir: Path, revision: str) -> TeacherFiles:
        """The files of a model: shipped in its directory, else in a folder of this revision under ``cache_dir``."""
        return cls(cache_dir / f"teachers-{revision}", model_directory)

    def find(self, name: str, revision: str | None = None) -> Path | None:
        """The folder ``name`` where it is there and, with ``revision``, was fitted on that model revision."""
        for place in (self.shipped, self.cache):
            if place is None:
                continue
            found = place / name
            if is_fitted(found, revision) if revision is not None else found.is_dir():
                return found
        return None

    def target(self, name: str) -> Path:
        """Where a new ``name`` is to be written. Nothing is made."""
        return self.cache / name

    def scratch(self, name: str) -> Path:
        """A folder, made if need be, for the resumable state of the fit of ``name``; ``clear_scratch`` drops it."""
        path = self.cache / f".fitting-{name.replace('/', '-')}"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def clear_scratch(self, name: str) -> None:
        """Remove the resumable state of a fit that has ended."""
        shutil.rmtree(self.cache / f".fitting-{name.replace('/', '-')}", ignore_errors=True)

    @contextmanager
    def publishing(self, name: str, revision: str) -> Iterator[Path]:
        """A temporary folder that becomes ``target(name)`` by one rename when the block ends well.

        Two workers may fit the same thing at once: the first to finish is kept. An unfinished or outdated
        ``target(name)`` is replaced. Raises TeacherNotUsable when no fit of ``revision`` stands there afterwards.
        """
        target = self.target(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        building = target.with_name(f".{target.name}-{os.getpid()}")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        try:
            yield building
            if target.exists() and not is_fitted(target, revision):
                shutil.rmtree(target, ignore_errors=True)
            with suppress(OSError):  # a sibling published the same first: its directory is not empty
                os.replace(building, target)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        if not is_fitted(target, revision):
            raise TeacherNotUsable(f"what was fitted could not be kept in {target}: is the disk full or read-only?")
