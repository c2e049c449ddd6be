"""The sketches of a release's items: those the model has, and those of items that came later.

Why it exists: a basis is fitted once (``byline sketches fit``, or it comes with the model), but a corpus goes on
growing. A new item costs its own gradients once; its sketch is kept in the cache, in the basis of the others.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from byline.catalog.blobs import BlobStore
from byline.catalog.decode import decode_image
from byline.catalog.items import Item
from byline.errors import TeacherNotUsable
from byline.releases.sketches import SketchParts, section_of
from byline.teachers import TeacherItem
from byline.teachers.files import SKETCHES, TeacherFiles
from byline.teachers.sketch_set import SketchSet
from byline.telemetry import get_logger

if TYPE_CHECKING:
    from byline.diffusion.model import DiffusionModel

log = get_logger(__name__)
Progress = Callable[[int, int], None]


class CorpusSketches:
    """``SketchRows`` from the sketch set of one model revision. ``load_model`` is called only for new items.

    A set of the layers ``selection`` is preferred; without one, that which the model came with is taken.
    """

    def __init__(
        self, files: TeacherFiles, revision: str, blobs: BlobStore, load_model: Callable[[], DiffusionModel],
        selection: str,
    ) -> None:  # fmt: skip
        self._files = files
        self._revision = revision
        self._names = (f"{SKETCHES}-{selection}", SKETCHES)
        self._blobs = blobs
        self._load_model = load_model

    def of_items(self, items: Sequence[Item], progress: Progress) -> SketchParts | None:
        """See ``SketchRows``. Raises TeacherNotUsable for a damaged set, or new items without the curvature."""
        found = (self._files.find(name, self._revision) for name in self._names)
        folder = next((place for place in found if place is not None), None)
        if folder is None:
            return None
        fitted = SketchSet.load(folder, self._revision)
        known = self._with_later(fitted)
        ids = np.array([item.item_id for item in items], dtype=np.int64)
        rows = known.rows_of(ids.tolist())
        if (rows < 0).any():
            missing = [item for item, row in zip(items, rows, strict=True) if row < 0]
            log.info("sketches_of_new_items", items=len(missing))
            known = self._added(fitted, known, missing, progress)
            rows = known.rows_of(ids.tolist())
        progress(len(items), len(items))
        section = section_of(
            teacher_id=fitted.teacher_id,
            dimensions=fitted.basis.dimensions,
            selection=fitted.basis.selection,
            query_draws=fitted.basis.settings.query_draws,
            fidelity=fitted.fidelity,
            token_rank=0 if known.tokens is None else known.tokens.basis.rank,
        )
        tokens = None if known.tokens is None else known.tokens.take(rows)
        return SketchParts(ids, known.sketches[rows], fitted.basis, section, tokens)

    def _later(self, fitted: SketchSet) -> Path:
        """Where sketches of later items are kept: a set in this very basis."""
        return self._files.target(f"{SKETCHES}-later-{fitted.basis.name}")

    def _with_later(self, fitted: SketchSet) -> SketchSet:
        try:
            later = SketchSet.load(self._later(fitted), self._revision)
        except (TeacherNotUsable, OSError, ValueError, KeyError):  # none yet, or damaged: computed again
            return fitted
        return fitted.with_items(later.item_ids.tolist(), later.sketches, later.tokens)

    def _added(self, fitted: SketchSet, known: SketchSet, missing: Sequence[Item], progress: Progress) -> SketchSet:
        """``known`` and the sketches of ``missing``, which are kept for the next time."""
        from byline.teachers.recipes import Fitting, Order, ekfac
        from byline.teachers.sketch import SketchTeacher

        model, basis = self._load_model(), fitted.basis
        curvature = ekfac(Order(model, self._files, basis.settings, basis.selection, Fitting()))
        if curvature is None:
            raise TeacherNotUsable(
                f"{len(missing)} items have no sketch yet, and the curvature {basis.preconditioner} to make it with is "
                f"neither beside the model nor in {self._files.cache}: copy it there, or fit the sketches again"
            )
        pictures = [
            TeacherItem(item.item_id, decode_image(self._blobs.get(item.image_sha256)), item.caption)
            for item in missing
        ]
        token_basis = None if fitted.tokens is None else fitted.tokens.basis
        found = SketchTeacher(model, curvature, basis, token_basis=token_basis).sketched(pictures, progress=progress)
        before = np.flatnonzero(~np.isin(known.item_ids, fitted.item_ids))
        tokens = None if known.tokens is None else known.tokens.take(before)
        later = SketchSet(basis, known.item_ids[before], known.sketches[before], {}, fitted.teacher_id, tokens)
        later = later.with_items(found.item_ids.tolist(), found.sketches, found.tokens)
        self._keep(later, self._later(fitted))
        # As it is read back, in half precision: this release and the next one agree to the bit.
        return self._with_later(fitted)

    def _keep(self, later: SketchSet, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        building = target.with_name(f".{target.name}-{os.getpid()}")
        shutil.rmtree(building, ignore_errors=True)
        try:
            later.save(building)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(building, target)
        finally:
            shutil.rmtree(building, ignore_errors=True)
