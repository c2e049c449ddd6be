"""The generator and the teachers this child has loaded, each once, on first use.

Why it exists: loading a pipeline and its curvature takes longer than scoring a query, and a worker serves
thousands. It also has the curvature fitted where none is kept beside the model yet: beside its lease, under the
same stop and cancel checks as any other work, and two workers may do it at once (``teachers.files``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from byline.catalog.blobs import BlobStore
from byline.catalog.decode import decode_image
from byline.catalog.store import CatalogStore
from byline.diffusion.model import DiffusionModel
from byline.errors import BylineError, InvalidRequest, ModelMismatch, TeacherNotUsable
from byline.teachers import Teacher, TeacherItem
from byline.teachers.files import PUBLISHED_SELECTION, TeacherFiles
from byline.teachers.first_order import AbuPlusLinear
from byline.teachers.natural_gradient import NaturalGradientTeacher, UnlearningSettings
from byline.teachers.recipes import Fitting
from byline.teachers.registry import load_ready_teacher
from byline.teachers.sketch import SketchTeacher
from byline.teachers.sketch_basis import SketchBasis
from byline.teachers.token_gradients import TokenGradients
from byline.telemetry import get_logger

log = get_logger(__name__)

#: Releases of which a teacher for their sketches is kept: the active one and the one before.
KEPT_SKETCHERS = 2
#: Teachers that are kept: those of verification, of curation and of two releases' sketches.
KEPT_TEACHERS = 4


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
        #: With the size of the corpus, by name, layers and all other settings; the one used last stands last.
        self._teachers: dict[tuple[str, str, UnlearningSettings], tuple[int, Teacher]] = {}
        self._sketchers: dict[tuple[Path, int], tuple[SketchTeacher, TokenGradients | None]] = {}
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
        """The teacher ``name`` with ``draws`` noise draws per item.

        ``overrides``: fields of UnlearningSettings, and ``selection`` of layers. Fits first what the model came
        without (curvature: minutes, once); ``check`` is called meanwhile and may raise. A corpus that has grown costs
        nothing: its size scales τ, so what was loaded for another size is shared. Raises TeacherNotUsable,
        ModelNotUsable, InvalidRequest for an unknown override.
        """
        fields = dict(overrides or {})
        selection = str(fields.pop("selection", PUBLISHED_SELECTION))
        settings = self._settings(draws, fields)
        key = (name, selection, replace(settings, corpus_size=0))
        size, found = self._teachers.pop(key, (0, None))
        if isinstance(found, NaturalGradientTeacher):
            found = found.resized(settings.corpus_size)
        elif size != settings.corpus_size:
            found = None
        if found is None:
            while len(self._teachers) >= KEPT_TEACHERS:
                del self._teachers[next(iter(self._teachers))]
            found = load_ready_teacher(
                name, self.model, TeacherFiles.beside(self._model_directory, self._cache_dir, self.model.revision),
                settings, self._corpus, selection=selection, check=check,
                fitting=Fitting(self._curvature_samples, self._seed),
            )  # fmt: skip
            log.info("teacher_ready", teacher=found.teacher_id)
        self._teachers[key] = settings.corpus_size, found
        return found

    def sketch_teacher(
        self, basis: Path, tokens: Path | None, draws: int, *, check: Callable[[], None] = lambda: None
    ) -> tuple[SketchTeacher, TokenGradients | None]:
        """The teacher of a release's sketches, with ``draws`` noise draws of a query, and its token gradients.

        ``basis`` and ``tokens`` are the release's files, read once. Raises TeacherNotUsable for those of another
        model or curvature, and what ``teacher`` raises.
        """
        key = (basis, draws)
        if key not in self._sketchers:
            found = SketchBasis.load(basis, self.model.revision)
            linear = self.teacher(
                "abu_plus_linear", found.settings.item_draws, check=check,
                overrides={**asdict(found.settings), "selection": found.selection},
            )  # fmt: skip
            if not isinstance(linear, AbuPlusLinear):
                raise TeacherNotUsable("abu_plus_linear is not the teacher sketches are made by")
            while len(self._sketchers) >= KEPT_SKETCHERS:
                del self._sketchers[next(iter(self._sketchers))]
            held = None if tokens is None else TokenGradients.load(tokens)
            sketcher = SketchTeacher(
                self.model, linear.curvature, found, token_basis=None if held is None else held.basis, query_draws=draws
            )
            self._sketchers[key] = sketcher, held
            log.info("teacher_ready", teacher=sketcher.teacher_id)
        return self._sketchers[key]

    def _settings(self, draws: int, overrides: dict[str, Any]) -> UnlearningSettings:
        if "corpus_size" in overrides:
            base = UnlearningSettings(corpus_size=int(overrides["corpus_size"]))
        else:
            # Withdrawn items count: the model was trained on them, and the step 1/N must not move with an opt-out.
            base = UnlearningSettings(corpus_size=self._catalog.size(self._corpus_id))
        if base.corpus_size < 1:
            raise TeacherNotUsable(f"corpus {self._corpus_id} holds no items", corpus_id=self._corpus_id)
        try:
            return replace(base, **{"seed": self._seed, "item_draws": draws, **overrides})
        except TypeError as error:
            raise InvalidRequest("payload.teacher_settings", str(error)) from error

    def _corpus(self) -> list[TeacherItem]:
        """The corpus a teacher is fitted on. Withdrawn items are left out of what is fitted from now on."""
        items = [
            TeacherItem(one.item_id, decode_image(self._blobs.get(one.image_sha256)), one.caption)
            for one in self._catalog.items(self._corpus_id)
        ]
        log.info("teacher_fit_started", items=len(items))
        return items
