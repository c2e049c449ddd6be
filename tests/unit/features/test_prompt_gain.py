"""The evidence for abstention: one number per query that is neither a feature of a head nor a way to compare items."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from byline.diffusion.model import DiffusionModel
from byline.diffusion.tiny import write_tiny_pipeline
from byline.errors import FeatureMismatch, ModelNotUsable
from byline.features import FeatureSpec, load_encoder, load_evidence
from byline.features.prompt_gain import NAME
from byline.teachers.recipes import TEACHERS

TEXTS = ["a cat", "two red boats on a lake", "", "tree", "a cat"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return DiffusionModel.load(write_tiny_pipeline(tmp_path_factory.mktemp("pipeline")))


def test_evidence_is_no_encoder_of_a_spec_and_no_similarity(model: DiffusionModel) -> None:
    with pytest.raises(FeatureMismatch, match="unknown encoder"):
        FeatureSpec.parse(f"denoiser+{NAME}")
    with pytest.raises(FeatureMismatch, match="unknown encoder"):
        load_encoder(NAME, model=model)
    with pytest.raises(FeatureMismatch, match="unknown encoder"):
        load_evidence("denoiser", model=model)
    with pytest.raises(ModelNotUsable, match="attributed model"):
        load_evidence(NAME)
    assert f"similarity:{NAME}" not in TEACHERS


def test_a_row_depends_on_image_and_prompt_and_not_on_its_batch(
    model: DiffusionModel, images: list[Image.Image]
) -> None:
    gain = load_evidence(NAME, model=model)
    together = gain.extract(images, TEXTS)
    assert together.shape == (5, 1) and gain.extract([], []).shape == (0, 1)
    alone = np.concatenate([gain.extract([image], [text]) for image, text in zip(images, TEXTS, strict=True)])
    np.testing.assert_allclose(alone, together, atol=2e-5)
    assert len({float(row[0]) for row in together}) == 5
    assert together[2, 0] == 0.0  # an empty prompt helps nothing


def test_the_gain_is_the_logarithm_of_the_ratio_of_the_two_losses(
    model: DiffusionModel, images: list[Image.Image]
) -> None:
    """Against the noise that the model predicts, one image at a time."""
    import torch

    timestep = round(0.3 * (model.num_timesteps - 1))
    latents = model.encode_images(images[:1])
    noise = torch.randn(model.latent_shape, generator=torch.Generator().manual_seed(0))[None]
    losses = []
    with torch.inference_mode():
        for prompt in ("", "a cat"):
            states = model.encode_prompts([prompt])
            losses.append(float(model.denoising_loss(latents, states, torch.tensor([timestep]), noise)[0]))
    found = load_evidence(NAME, model=model).extract(images[:1], ["a cat"])[0, 0]
    assert found == pytest.approx(np.log(losses[0] / losses[1]), abs=1e-5)
