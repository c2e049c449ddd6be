"""Every encoder: right width, finite, not dependent on the batch, and comparable only with itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from byline.diffusion.model import DiffusionModel
from byline.diffusion.tiny import write_tiny_pipeline
from byline.errors import FeatureMismatch, ModelNotUsable
from byline.features import Encoder, FeatureExtractor, FeatureSpec, load_encoder, load_extractor

TEXTS = ["a cat", "two red boats on a lake", "", "tree", "a cat"]
NAMES = ["dino", "dinov2", "clip_image", "clip_text", "efficientnet_lite0", "minilm", "denoiser"]
DIMS = {"dino": 16, "dinov2": 16, "clip_image": 12, "clip_text": 12, "efficientnet_lite0": 1280, "minilm": 384}


@pytest.fixture(scope="module")
def encoders(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Encoder]:
    model = DiffusionModel.load(write_tiny_pipeline(tmp_path_factory.mktemp("pipeline")))
    return {name: load_encoder(name, source=models.get(name), model=model) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_row_does_not_depend_on_its_batch(name: str, encoders: dict[str, Encoder], images: list[Image.Image]) -> None:
    encoder = encoders[name]
    together = encoder.encode(images, TEXTS)
    assert together.shape == (5, encoder.dim)
    assert together.dtype == np.float32
    assert np.isfinite(together).all()
    assert encoder.dim == DIMS.get(name, encoder.dim)
    scale = float(np.abs(together).max())
    for n in range(5):
        alone = encoder.encode(images[n : n + 1], TEXTS[n : n + 1])[0]
        np.testing.assert_allclose(alone, together[n], atol=2e-5 * scale)


@pytest.mark.parametrize("name", NAMES)
def test_an_encoder_looks_at_what_it_says_it_looks_at(
    name: str, encoders: dict[str, Encoder], images: list[Image.Image]
) -> None:
    encoder = encoders[name]
    base = encoder.encode(images[:1], ["a cat"])
    other_image = encoder.encode(images[1:2], ["a cat"])
    other_text = encoder.encode(images[:1], ["two red boats"])
    assert np.allclose(base, other_image) == (encoder.modality == "text")
    assert np.allclose(base, other_text) == (encoder.modality == "image")
    assert encoder.encode([], []).shape == (0, encoder.dim)


def test_hashes_tell_encoders_and_weights_apart(encoders: dict[str, Encoder], tmp_path: Path) -> None:
    hashes = {name: encoder.preprocessing_hash for name, encoder in encoders.items()}
    assert len(set(hashes.values())) == len(NAMES)
    other = DiffusionModel.load(write_tiny_pipeline(tmp_path, seed=1))
    assert load_encoder("denoiser", model=other).preprocessing_hash != hashes["denoiser"]


def test_a_spec_puts_the_blocks_side_by_side_in_its_order(
    encoders: dict[str, Encoder], images: list[Image.Image]
) -> None:
    extractor = FeatureExtractor(FeatureSpec.parse("dino+clip_text"), [encoders["dino"], encoders["clip_text"]])
    features = extractor.extract(images, TEXTS)
    assert extractor.spec.name == "dino+clip_text"
    assert (extractor.dims, extractor.dim) == ((16, 12), 28)
    np.testing.assert_allclose(features[:, :16], encoders["dino"].encode(images, TEXTS), atol=1e-6)
    turned = FeatureExtractor(FeatureSpec.parse("clip_text+dino"), [encoders["clip_text"], encoders["dino"]])
    assert turned.preprocessing_hash != extractor.preprocessing_hash
    with pytest.raises(FeatureMismatch):
        extractor.extract(images, TEXTS[:2])
    with pytest.raises(FeatureMismatch):
        FeatureExtractor(FeatureSpec.parse("dino+clip_text"), [encoders["clip_text"], encoders["dino"]])


@pytest.mark.parametrize("text", ["", "dino+", "dino+dino", "resnet"])
def test_a_spec_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(FeatureMismatch):
        FeatureSpec.parse(text)


def test_widths_are_unknown_until_the_encoders_are_loaded() -> None:
    with pytest.raises(FeatureMismatch):
        _ = FeatureSpec.parse("dino").dims


def test_a_model_that_cannot_be_used_is_one_typed_error(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotUsable):
        load_encoder("dino", source=tmp_path / "empty")
    with pytest.raises(ModelNotUsable):
        load_encoder("dino", source=tmp_path / "absent")
    with pytest.raises(ModelNotUsable, match="lacks weights"):
        load_encoder("clip_image", source=models["dino"])
    with pytest.raises(ModelNotUsable, match="denoiser"):
        load_encoder("denoiser")
    with pytest.raises(FeatureMismatch):
        load_extractor("dino+unheard_of")


def test_similar_captions_are_nearer_than_others(encoders: dict[str, Encoder]) -> None:
    blank = [Image.new("RGB", (8, 8))] * 3
    cat, kitten, lorry = encoders["minilm"].encode(blank, ["a cat", "a kitten", "a lorry on a motorway"])
    assert cat @ kitten > cat @ lorry + 0.2
