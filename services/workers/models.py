"""The models one worker answers for, each with its own release, encoders, corpus and withdrawn items.

Why it exists: several models stand side by side, and a fleet per model would leave most of it idle. What belongs to one
model (its active release, its corpus) is built from that model's settings exactly as if it were the only one; this
module keeps them apart by the job's model, so no answer can mix two. Encoders that look at no generator are shared.

Memory: each model holds its active release and the one before, and a third while it swaps; embeddings are mapped and
shared between processes, catalogue and head are not. ``BYLINE_SERVE_MODELS`` says which models a worker takes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from byline.catalog.store import CatalogStore, ModelRecord
from byline.config import Settings
from byline.errors import BylineError, ModelMismatch
from byline.jobs import Claim
from byline.jobs.runner import Beat, Outcome
from byline.telemetry import get_logger
from services.workers.report import WorkerState

if TYPE_CHECKING:
    from byline.releases.delta_view import Deltas
    from services.workers.lookup import LookupStage
    from services.workers.serving import Serving
    from services.workers.withdrawal import WithdrawnItems

log = get_logger(__name__)

#: Serve every model that is registered.
ALL = "*"
#: Between looks for models that were registered meanwhile.
LOOK_S = 5.0


@dataclass(frozen=True)
class ServedModel:
    """One model's part of a lookup worker."""

    serving: Serving
    stage: LookupStage
    withdrawn: WithdrawnItems
    deltas: Deltas


def settings_of(settings: Settings, model: ModelRecord) -> Settings:
    """The settings of a worker that serves this model alone."""
    if model.model_id == settings.model_id:
        return settings
    return settings.model_copy(update={
        "model_id": model.model_id, "corpus_id": model.corpus_id, "model_directory": model.directory,
    })  # fmt: skip


def wanted_models(settings: Settings, registered: Iterable[ModelRecord]) -> list[ModelRecord]:
    """Those of the registered models that ``serve_models`` asks for, besides the configured one."""
    names = {name.strip() for name in settings.serve_models.split(",")}
    return [one for one in registered
            if one.model_id != settings.model_id and (ALL in names or one.model_id in names)]


class ServedModels:
    """Serves the configured model from the start, and others as they are registered."""

    def __init__(
        self, settings: Settings, catalog: CatalogStore, make: Callable[[Settings], ServedModel],
        stop: threading.Event,
    ) -> None:  # fmt: skip
        self._settings = settings
        self._catalog = catalog
        self._make = make
        self._stop = stop
        self._models: dict[str, ServedModel] = {settings.model_id: make(settings)}

    def start(self) -> None:
        """Load the configured model's release, then the others', and look for new models from now on."""
        self._models[self._settings.model_id].serving.start()
        self._try_to_look()
        threading.Thread(target=self._watch, name="model-watch", daemon=True).start()

    def look(self) -> None:
        """Begin to serve models that were registered since the last look. Raises DatabaseUnavailable."""
        for record in wanted_models(self._settings, self._catalog.models()):
            if record.model_id in self._models or self._stop.is_set():
                continue
            made = self._make(settings_of(self._settings, record))
            made.serving.start()
            self._models = {**self._models, record.model_id: made}
            log.info("model_served", model_id=record.model_id, corpus_id=record.corpus_id)

    def pins(self) -> dict[str, str]:
        """The release to pin to the next claim, by model; only jobs of these models are to be taken."""
        found = {name: one.serving.served_id for name, one in self._models.items()}
        pins = {name: release_id for name, release_id in found.items() if release_id is not None}
        if pins:
            return pins
        release_id = self._models[self._settings.model_id].serving.current_id()
        return {} if release_id is None else {self._settings.model_id: release_id}

    def __call__(self, claim: Claim, beat: Beat) -> Outcome:
        """The stage ``lookup`` of the job's model. ModelMismatch for a job that ``pins`` did not offer."""
        model = self._models.get(claim.job.model_id)
        if model is None:
            raise ModelMismatch(f"this worker does not serve model {claim.job.model_id}", model_id=claim.job.model_id)
        return model.stage(claim, beat)

    def withdrawn_changed(self) -> None:
        """Items of some corpus were withdrawn. Any thread."""
        for model in self._models.values():
            model.withdrawn.changed()

    def deltas_changed(self) -> None:
        """The delta of some release grew. Any thread."""
        for model in self._models.values():
            model.deltas.changed()

    def state(self) -> WorkerState:
        """For the fleet view: the configured model's, and of each model."""
        states: Mapping[str, WorkerState] = {name: one.serving.state() for name, one in self._models.items()}
        own = states[self._settings.model_id]
        return WorkerState(own.release_id, own.error, own.loading, states)

    def close(self) -> None:
        """Wait for the watches to end; ``stop`` must be set."""
        for model in self._models.values():
            model.serving.close()

    def _watch(self) -> None:
        while not self._stop.wait(LOOK_S):
            self._try_to_look()

    def _try_to_look(self) -> None:
        try:
            self.look()
        except BylineError as error:
            log.warning("models_not_looked_at", reason=error.reason)
        except Exception:  # a database without tables yet, a library that crashes: serve on, look again
            log.exception("models_not_looked_at")
