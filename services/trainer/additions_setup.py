"""What the additions' thread is made of: an engine, and the encoders of whatever release answers.

Why it exists: a release brings its own feature spec, and the encoders here must be those its head was trained on. They
are loaded on the thread that uses them, a second set beside the trainer's: layers that are being watched for gradients
cannot serve two at once.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import TYPE_CHECKING

from byline.catalog.blobs import BlobStore
from byline.catalog.store import CatalogStore
from byline.config import Settings
from byline.db.session import make_engine
from byline.errors import FeatureMismatch
from byline.security.signing import Keyring
from byline.telemetry import get_logger
from services.trainer.additions import Additions, AdditionsThread

if TYPE_CHECKING:
    from byline.rankings.features import LabelFeatures
    from byline.releases.manifest import ReleaseManifest

log = get_logger(__name__)

#: One for the lock of a block, one for what is read and written meanwhile.
_POOL_SIZE = 2


def start_additions(settings: Settings, stop: threading.Event) -> AdditionsThread:
    """The thread that keeps the deltas of the settings' model, started."""
    thread = AdditionsThread(lambda: additions_of(settings), settings.database_url, stop)
    thread.start()
    return thread


def additions_of(settings: Settings) -> Additions:
    """As the settings say. ModelNotFound while the model is not registered."""
    import torch

    from byline.diffusion.model import DiffusionModel
    from byline.features import load_extractor
    from byline.features.registry import needs_model
    from byline.rankings.features import LabelFeatures

    torch.set_num_threads(settings.torch_threads)  # of this thread
    engine = make_engine(settings.database_url, _POOL_SIZE, application="byline-additions")
    record = CatalogStore(engine).model(settings.model_id)
    blobs = BlobStore(settings.blob_dir)

    @lru_cache(maxsize=2)
    def loaded(spec: str) -> tuple[LabelFeatures, str]:
        model = DiffusionModel.load(record.directory, settings.device) if needs_model(spec) else None
        extractor = load_extractor(spec, device=settings.device, model=model, cache=settings.cache_dir)
        log.info("encoders_of_additions_ready", feature_spec=spec)
        return LabelFeatures(extractor, blobs, settings.cache_dir, record.corpus_id), extractor.preprocessing_hash

    def encoder_of(manifest: ReleaseManifest) -> LabelFeatures:
        features, preprocessing = loaded(manifest.feature_spec)
        if preprocessing != manifest.preprocessing_hash:
            raise FeatureMismatch(
                f"release {manifest.release_id} was made with {manifest.feature_spec} of preprocessing "
                f"{manifest.preprocessing_hash}, this machine's is {preprocessing}: its delta cannot be kept",
                release_id=manifest.release_id,
            )
        return features

    return Additions(engine, settings.model_id, encoder_of, keyring=Keyring.parse(settings.signing_key))
