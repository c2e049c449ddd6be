"""The generator and the teachers this child has loaded, each once, on first use.

Why it exists: loading a pipeline and its curvature takes longer than scoring a query, and a worker serves
thousands. It also fits the curvature where none is kept beside the model yet: beside its lease, under the same
stop and cancel checks as any other work, and published by one rename, so that two workers may do it at once.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from byline.catalog.blobs import BlobStore
from byline.catalog.decode import decode_image
from byline.catalog.store import CatalogStore
from byline.diffusion.model import DiffusionModel
from byline.errors import BylineError, InvalidRequest, ModelMismatch, TeacherNotUsable
from byline.teachers import Teacher, TeacherItem, load_teacher
from byline.teachers.curvature import Curvature
from byline.teachers.natural_gradient import UnlearningSettings
from byline.teachers.registry import ensure_curvature, holds_curvature
from byline.telemetry import get_logger

log = get_logger(__name__)


class TeacherBench:
    """One model, its curvature and its teachers. Used by the child's main thread only."""

    def __init__(
        self,
        *,
        model_directory: Path,
        cache_dir: Path,
        corpus_id: str,
        catalog: CatalogStore,
        blobs: BlobStore,
        device: str,
        seed: int,
        curvature_samples: int = 4096,
    ) -> None:
        self._model_directory = model_directory
        self._cache_dir = cache_dir
        self._corpus_id = corpus_id
        self._catalog = catalog
        self._blobs = blobs
        self._device = device
        self._seed = seed
        self._curvature_samples = curvature_samples
        self._model: DiffusionModel | None = None
        self._teachers: dict[tuple[str, UnlearningSettings], Teacher] = {}
        #: Why the generator could not be loaded, as the fleet view shows it; None once it is.
        self.error: str | None = None

    def try_to_load(self) -> bool:
        """Load the generator if it is not loaded; whether it is now. A failure is kept in ``error``, never raised."""
        if self._model is not None:
            return True
        try:
            log.info("model_loaded", revision=self.model.revision)
        except BylineError as error:
            log.error("model_not_loaded", reason=error.reason, error=error.message)
        except Exception:  # a damaged file or a library's fault: this worker waits, its jobs are not to blame
            log.exception("model_not_loaded")
        return self._model is not None

    @property
    def model(self) -> DiffusionModel:
        """The generator, loaded on first use. Raises ModelNotUsable, and whatever else loading it raises."""
        if self._model is None:
            try:
                self._model = DiffusionModel.load(self._model_directory, self._device)
            except Exception as error:
                self.error = error.message if isinstance(error, BylineError) else f"{type(error).__name__}: {error}"
                raise
            self.error = None
        return self._model

    @property
    def model_revision(self) -> str:
        """Revision of the loaded generator."""
        return self.model.revision

    def require_revision(self, revision: str, of: str) -> None:
        """Raise ModelMismatch unless the loaded generator has this ``revision``, which is that ``of`` something."""
        if self.model_revision != revision:
            raise ModelMismatch(
                f"this worker has loaded revision {self.model_revision} of the model, {of} is of revision {revision}",
                loaded_revision=self.model_revision,
                wanted_revision=revision,
            )

    def teacher(
        self,
        name: str,
        draws: int,
        *,
        overrides: Mapping[str, Any] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> Teacher:
        """The teacher ``name`` with ``draws`` noise draws per item; ``overrides`` are fields of UnlearningSettings.

        Fits the curvature first if the model has none (minutes, once); ``check`` is called meanwhile and may
        raise. Raises TeacherNotUsable, ModelNotUsable, InvalidRequest for an unknown override.
        """
        settings = self._settings(draws, dict(overrides or {}))
        key = (name, settings)
        if key not in self._teachers:
            self._teachers[key] = load_teacher(name, self.model, self._curvature_directory(check), settings)
            log.info("teacher_ready", teacher=self._teachers[key].teacher_id)
        return self._teachers[key]

    def _settings(self, draws: int, overrides: dict[str, Any]) -> UnlearningSettings:
        if "corpus_size" in overrides:
            base = UnlearningSettings(corpus_size=int(overrides["corpus_size"]))
        else:
            # Withdrawn items count: the model was trained on them, and the step 1/N must not move with an opt-out.
            base = UnlearningSettings(corpus_size=len(self._catalog.items(self._corpus_id, include_withdrawn=True)))
        if base.corpus_size < 1:
            raise TeacherNotUsable(f"corpus {self._corpus_id} holds no items", corpus_id=self._corpus_id)
        try:
            return replace(base, **{"seed": self._seed, "item_draws": draws, **overrides})
        except TypeError as error:
            raise InvalidRequest("payload.teacher_settings", str(error)) from error

    def _curvature_directory(self, check: Callable[[], None]) -> Path:
        """Where fitted curvature lies: beside the model if it came with it, else in this machine's cache."""
        shipped = self._model_directory / "curvature"
        if holds_curvature(shipped, self.model.revision):
            return shipped
        kept = self._cache_dir / f"curvature-{self.model.revision}"
        if not holds_curvature(kept, self.model.revision):
            self._fit(kept, check)
        return kept

    def _fit(self, target: Path, check: Callable[[], None]) -> Curvature:
        items = [
            TeacherItem(one.item_id, decode_image(self._blobs.get(one.image_sha256)), one.caption)
            for one in self._catalog.items(self._corpus_id)
        ]
        if not items:
            raise TeacherNotUsable(f"corpus {self._corpus_id} holds no items to fit curvature on")
        log.info("curvature_fit_started", items=len(items))
        target.parent.mkdir(parents=True, exist_ok=True)
        building = target.with_name(f".{target.name}-{os.getpid()}")
        shutil.rmtree(building, ignore_errors=True)
        try:
            curvature = ensure_curvature(
                self.model,
                items,
                building,
                samples=self._curvature_samples,
                seed=self._seed,
                progress=lambda _done, _total: check(),
            )
            with suppress(OSError):  # a sibling published the same curvature first: its directory is not empty
                os.replace(building, target)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        if not (target / "manifest.json").exists():
            raise TeacherNotUsable(f"fitted curvature could not be kept in {target}")
        return curvature
