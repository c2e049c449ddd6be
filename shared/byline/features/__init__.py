"""Frozen encoders behind one interface, the spec that names a combination, and the store of their outputs."""

from byline.features.encoder import Encoder
from byline.features.extractor import FeatureExtractor, load_evidence, load_extractor
from byline.features.registry import ENCODERS, load_encoder
from byline.features.spec import FeatureSpec
from byline.features.store import FeatureStore, fill_store

__all__ = [
    "ENCODERS", "Encoder", "FeatureExtractor", "FeatureSpec", "FeatureStore", "fill_store", "load_encoder",
    "load_evidence", "load_extractor",
]  # fmt: skip
