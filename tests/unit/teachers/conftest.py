"""One tiny pipeline, a corpus of twenty-four noise pictures, and its curvature."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from byline.diffusion.model import DiffusionModel
from byline.diffusion.tiny import write_tiny_pipeline
from byline.teachers import TeacherItem, TeacherQuery
from byline.teachers.curvature import Curvature
from byline.teachers.curvature_fit import fit_curvature
from byline.teachers.natural_gradient import UnlearningSettings


@dataclass(frozen=True)
class Bench:
    model: DiffusionModel
    items: list[TeacherItem]
    query: TeacherQuery
    curvature: Curvature
    settings: UnlearningSettings


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.set_num_threads(1)
    model = DiffusionModel.load(write_tiny_pipeline(tmp_path_factory.mktemp("tiny")))
    pixels = np.random.default_rng(0).integers(0, 255, (24, 8, 8, 3), dtype=np.uint8)
    items = [TeacherItem(100 + i, Image.fromarray(p), f"a red cat w{i % 7}") for i, p in enumerate(pixels)]
    latents = model.encode_images([item.image for item in items])
    states = model.encode_prompts([item.caption for item in items])
    curvature = fit_curvature(model, latents, states, samples=512, seed=0)
    settings = UnlearningSettings(corpus_size=24, query_draws=64, item_draws=16)
    return Bench(model, items, TeacherQuery(items[3].image, items[3].caption), curvature, settings)
