import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from byline.diffusion.model import DiffusionModel
from byline.diffusion.tiny import write_tiny_pipeline
from byline.errors import ModelNotUsable


@pytest.fixture(scope="module", params=["clip", "minilm"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    torch.set_num_threads(1)
    return DiffusionModel.load(write_tiny_pipeline(tmp_path_factory.mktemp(request.param), text=request.param))


def pictures(n: int) -> list[Image.Image]:
    return [Image.fromarray(p) for p in np.random.default_rng(0).integers(0, 255, (n, 8, 8, 3), dtype=np.uint8)]


def test_both_layouts_encode_denoise_and_sample(model: DiffusionModel) -> None:
    latents = model.encode_images(pictures(3))
    states = model.encode_prompts(["a cat", "a dog", "a cat"])
    assert latents.shape == (3, *model.latent_shape)
    assert torch.equal(states[0], states[2])
    losses = model.denoising_loss(latents, states, torch.tensor([0, 500, 999]), torch.zeros_like(latents))
    assert losses.shape == (3,) and torch.isfinite(losses).all()
    assert model.generate(["a cat"], [0], steps=2)[0].size == (8, 8)


def test_a_sample_depends_on_its_seed_and_not_on_its_batch(model: DiffusionModel) -> None:
    many = model.generate(["a cat", "a dog", "a fish"], [1, 2, 3], steps=3, batch=3)
    one = model.generate(["a dog"], [2], steps=3)
    assert np.abs(np.asarray(many[1], int) - np.asarray(one[0], int)).max() <= 1
    other = model.generate(["a dog"], [5], steps=3)
    assert not np.array_equal(np.asarray(other[0]), np.asarray(one[0]))


def test_features_do_not_depend_on_the_batch(model: DiffusionModel) -> None:
    latents, states = model.encode_images(pictures(5)), model.encode_prompts(["a cat"] * 5)
    whole = model.mid_block_features(latents, states, [100, 600], seed=0)
    part = model.mid_block_features(latents[3:4], states[3:4], [100, 600], seed=0)
    assert torch.allclose(whole[3], part[0], atol=1e-5)


def test_the_noised_latent_follows_the_schedule_of_diffusers(model: DiffusionModel) -> None:
    latents = model.encode_images(pictures(2))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([3, 700])
    assert torch.allclose(model.add_noise(latents, noise, times), model.schedule.add_noise(latents, noise, times))


def test_the_revision_names_the_weights(tmp_path: Path) -> None:
    first = DiffusionModel.load(write_tiny_pipeline(tmp_path / "a", seed=0)).revision
    assert DiffusionModel.load(write_tiny_pipeline(tmp_path / "b", seed=0)).revision == first
    assert DiffusionModel.load(write_tiny_pipeline(tmp_path / "c", seed=1)).revision != first


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotUsable, match=r"model_index\.json"):
        DiffusionModel.load(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({}))
    with pytest.raises(ModelNotUsable, match="unet"):
        DiffusionModel.load(tmp_path)


def test_prompts_encoded_in_inference_mode_can_still_meet_autograd(model: DiffusionModel) -> None:
    with torch.inference_mode():
        model.encode_prompts(["a green car"])
    states = model.encode_prompts(["a green car"])
    weight = torch.ones(states.shape[-1], requires_grad=True)
    (states * weight).sum().backward()
    assert torch.allclose(weight.grad, states.sum((0, 1)))
