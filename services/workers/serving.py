"""What the lookup worker answers from: the active release and the encoders its head was trained on.

Why it exists: a head fed by other encoders than its own gives plausible nonsense. So release and encoders are
loaded, checked against each other and swapped as one; a pair that does not fit is never served, the old one stays.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from byline.config import Settings
from byline.diffusion.model import DiffusionModel
from byline.errors import BylineError, FeatureMismatch, ModelNotUsable, NoActiveRelease
from byline.evaluation.calibration import Calibrator
from byline.features import FeatureExtractor, load_evidence, load_extractor
from byline.features.registry import EVIDENCE, needs_model
from byline.releases.holder import ReleaseHolder, Swap
from byline.releases.loader import Release, load_release
from byline.releases.manifest import ReleaseManifest
from byline.releases.registry import ReleaseRegistry
from byline.security.signing import Keyring
from byline.telemetry import RELEASE_INFO, SWAP_SECONDS, get_logger
from services.workers.report import WorkerState

log = get_logger(__name__)

#: Priority of the thread that loads releases, as ``nice`` counts it: of Linux' threads each has its own.
LOADER_NICE = 10


@dataclass(frozen=True)
class Served:
    """A release with the encoders that make its query features, and the one of its evidence if it asks for any."""

    release: Release
    extractor: FeatureExtractor
    calibrator: Calibrator = Calibrator()
    evidence: FeatureExtractor | None = None

    @property
    def release_id(self) -> str:
        """The release's name."""
        return self.release.release_id

    def features(self, image: Image.Image, prompt: str) -> NDArray[np.float32]:
        """The features [d_in] of one query."""
        row: NDArray[np.float32] = self.extractor.extract([image], [prompt])[0]
        return row

    @property
    def preprocessing_hash(self) -> str:
        """Of everything that :meth:`query_row` holds."""
        more = "" if self.evidence is None else f"+{self.evidence.preprocessing_hash}"
        return self.extractor.preprocessing_hash + more

    def query_row(self, image: Image.Image, prompt: str) -> NDArray[np.float32]:
        """[d_in + 1]: the features, and last the evidence that the model made this image from this prompt.

        NaN where the release asks for none, or there is no prompt to weigh the image against.
        """
        weighed = self.evidence is not None and prompt.strip()
        gain = self.evidence.extract([image], [prompt])[0, 0] if self.evidence is not None and weighed else np.nan
        return np.append(self.features(image, prompt), np.float32(gain))

    def embed(self, image: Image.Image, prompt: str) -> NDArray[np.float32]:
        """The head's embedding [embedding_dim] of one query."""
        embedding: NDArray[np.float32] = self.release.embed(self.features(image, prompt)[None, :])[0]
        return embedding


class EncoderShelf:
    """Encoders that are loaded, for all models of a process: those that look at no generator are shared."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._held: dict[tuple[str, str], FeatureExtractor] = {}

    def get(self, feature_spec: str, model_directory: Path, load: Callable[[], FeatureExtractor]) -> FeatureExtractor:
        """The encoders of a spec, loaded once. ``lock`` must be held."""
        own = feature_spec in EVIDENCE or needs_model(feature_spec)
        key = (feature_spec, str(model_directory) if own else "")
        if key not in self._held:
            self._held[key] = load()
        return self._held[key]


class Serving:
    """Holds what is served. ``current_id`` and ``pinned`` are for the child's main thread, the watch has its own."""

    def __init__(
        self,
        *,
        registry: ReleaseRegistry,
        settings: Settings,
        stop: threading.Event,
        changed: Callable[[], None],
        encoders: EncoderShelf | None = None,
    ) -> None:
        self._registry = registry
        self._settings = settings
        self._stop = stop
        self._changed = changed
        self._encoders = encoders or EncoderShelf()
        self._shown: str | None = None
        self._watch: threading.Thread | None = None
        self._holder: ReleaseHolder[Served] = ReleaseHolder(
            self._load, lambda: registry.active(settings.model_id), on_swap=self._swapped, on_status=changed
        )

    def start(self) -> None:
        """Load the active release and follow every change from now on.

        Before the first release the encoders that it will probably need are loaded, so that it is served at once.
        """
        self._holder.refresh()
        if self._holder.status.release_id is None:
            try:
                with self._encoders.lock:
                    self._loaded(self._settings.feature_spec)
            except BylineError as error:
                log.warning("encoders_not_loaded", reason=error.reason, error=error.message)
            except Exception:  # the release's own load meets it again, reports it and goes on trying
                log.exception("encoders_not_loaded")
        self._watch = self._holder.watch(self._stop, self._settings.database_url, begin=_step_back)

    def close(self) -> None:
        """Wait for the watch to end; ``stop`` must be set."""
        if self._watch is not None:
            self._watch.join(timeout=5.0)

    @property
    def served_id(self) -> str | None:
        """The release that answers now; asks nobody."""
        return self._holder.status.release_id

    def current_id(self) -> str | None:
        """The release to pin to the next claim; None while no release can be served."""
        if self._holder.status.release_id is None:
            self._holder.refresh()
        return self._holder.status.release_id

    @contextmanager
    def pinned(self, release_id: str | None) -> Iterator[Served]:
        """The release a job is pinned to, unchanged until the block ends.

        Raises NoActiveRelease for a job that could not be pinned, and what loading an old release raises.
        """
        if release_id is None:
            raise NoActiveRelease("this worker serves no release yet", model_id=self._settings.model_id)
        with self._holder.pinned(release_id) as served:
            yield served

    def state(self) -> WorkerState:
        """For the fleet view: what is served, and why the last load failed if it did."""
        status = self._holder.status
        return WorkerState(status.release_id, status.error, status.loading)

    # -- loading ----------------------------------------------------------------------------------

    def _load(self, release_id: str) -> Served:
        record = self._registry.get(release_id)
        keyring = Keyring.parse(self._settings.signing_key)
        release = load_release(
            record.directory, expected=record.manifest, device=self._settings.device, keyring=keyring
        )
        manifest, calibrator = release.manifest, Calibrator.from_json(release.calibrator)
        asked = calibrator.abstention.evidence if calibrator.abstention is not None else None
        extractor = self._extractor(manifest, manifest.feature_spec, manifest.preprocessing_hash)
        evidence = None if asked is None else self._extractor(manifest, asked.encoder, asked.preprocessing_hash)
        return Served(release, extractor, calibrator, evidence)

    def _extractor(self, manifest: ReleaseManifest, spec: str, preprocessing_hash: str) -> FeatureExtractor:
        """The encoders of a spec, loaded once. FeatureMismatch unless they preprocess as the release recorded."""
        with self._encoders.lock:
            extractor = self._loaded(spec)
            if extractor.preprocessing_hash != preprocessing_hash:
                raise FeatureMismatch(
                    f"release {manifest.release_id} was made with {spec} of preprocessing "
                    f"{preprocessing_hash}; this worker's is {extractor.preprocessing_hash}",
                    release_id=manifest.release_id,
                )
            return extractor

    def _loaded(self, feature_spec: str) -> FeatureExtractor:
        return self._encoders.get(
            feature_spec, self._settings.model_directory, lambda: self._load_extractor(feature_spec)
        )

    def _load_extractor(self, feature_spec: str) -> FeatureExtractor:
        settings = self._settings
        # What a calibrator asks for comes by one name, as a head's encoders by theirs.
        is_evidence = feature_spec in EVIDENCE
        model: DiffusionModel | None = None
        if is_evidence or needs_model(feature_spec):
            model = DiffusionModel.load(settings.model_directory, settings.device)
        try:
            extractor = (
                load_evidence(feature_spec, device=settings.device, model=model) if is_evidence
                else load_extractor(feature_spec, device=settings.device, model=model, cache=settings.cache_dir)
            )  # fmt: skip
            extractor.extract([Image.new("RGB", (64, 64))], ["warm up"])
        except (OSError, RuntimeError, ValueError) as error:
            raise ModelNotUsable(
                f"the encoders {feature_spec} cannot be used: {type(error).__name__}", cause=str(error)[:200]
            ) from error
        log.info("encoders_ready", feature_spec=feature_spec)
        return extractor

    def _swapped(self, swap: Swap) -> None:
        SWAP_SECONDS.observe(swap.seconds)
        if self._shown is not None:
            RELEASE_INFO.remove(self._shown)
        self._shown = swap.release_id
        RELEASE_INFO.labels(swap.release_id).set(1)
        self._changed()


def _step_back() -> None:
    """What this thread does is behind what the process' others do: loading a release must not be felt by lookups."""
    torch.set_num_threads(1)  # the count belongs to each thread
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOADER_NICE)
    except OSError as error:
        log.warning("loader_not_niced", error=str(error))
