"""Image and text in, one feature row out: the encoders of a spec side by side.

Why it exists: the trainer, the builder and the lookup worker must make features in exactly one way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from byline.errors import FeatureMismatch
from byline.features.denoiser import DenoisingModel
from byline.features.encoder import Encoder, Features
from byline.features.registry import GRADIENT, load_encoder, load_evidence_encoder
from byline.features.spec import FeatureSpec


class FeatureExtractor:
    """The encoders of one spec. ``spec`` carries their widths and hashes."""

    def __init__(self, spec: FeatureSpec, encoders: Sequence[Encoder]) -> None:
        """FeatureMismatch when the encoders are not those of the spec, in its order."""
        names = tuple(encoder.name for encoder in encoders)
        if names != spec.encoders:
            raise FeatureMismatch(f"encoders {names} do not make {spec.name}", spec=spec.name)
        self._encoders = tuple(encoders)
        self.spec = FeatureSpec(names, tuple(e.dim for e in encoders), tuple(e.preprocessing_hash for e in encoders))

    @property
    def dims(self) -> tuple[int, ...]:
        """Width of each encoder's block, in order."""
        return self.spec.dims

    @property
    def dim(self) -> int:
        """Width of a feature row."""
        return self.spec.dim

    @property
    def preprocessing_hash(self) -> str:
        """Says which features may be compared with these."""
        return self.spec.preprocessing_hash

    def extract(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Features:
        """Features [n, dim] float32 of n pairs of image and prompt (or caption).

        A row does not depend on the batch it is in, beyond float rounding. FeatureMismatch when the counts
        differ or an encoder gives something that is not finite.
        """
        if len(images) != len(texts):
            raise FeatureMismatch(f"{len(images)} images and {len(texts)} texts are not pairs")
        blocks = [encoder.encode(images, texts) for encoder in self._encoders]
        features = np.concatenate(blocks, axis=1)
        if features.shape != (len(images), self.dim) or not bool(np.isfinite(features).all()):
            raise FeatureMismatch(f"{self.spec.name} gave features that are not finite or of shape {features.shape}")
        return features


def load_extractor(
    spec: str, *, device: str = "cpu", sources: Mapping[str, Path | str] | None = None,
    model: DenoisingModel | None = None, cache: Path | None = None,
) -> FeatureExtractor:  # fmt: skip
    """Load all encoders of a spec by name; ``sources`` maps encoder names to hub names or directories.

    ``model``: the attributed model, for specs that ``needs_model``; ``cache``: where its fits lie that it came without.
    """
    parsed = FeatureSpec.parse(spec)
    where = {**({} if cache is None else {GRADIENT: cache}), **(sources or {})}
    encoders = [load_encoder(name, device=device, source=where.get(name), model=model) for name in parsed.encoders]
    return FeatureExtractor(parsed, encoders)


def load_evidence(name: str, *, device: str = "cpu", model: DenoisingModel | None = None) -> FeatureExtractor:
    """Load the evidence of this name (``registry.EVIDENCE``); its rows are [n, 1]. Errors as of ``load_encoder``."""
    return FeatureExtractor(FeatureSpec((name,)), [load_evidence_encoder(name, device=device, model=model)])
