"""``gradient``: the attributed model's own gradient on image and prompt, as few numbers.

Why it exists: influence is an inner product of gradients, so a cheap gradient of the query says more of it than any
picture of the picture. It needs what the teacher's fit leaves beside the model: curvature and a ``GradientBasis``
(``byline sketches fit``). Four draws cost about what ``denoiser`` costs. It belongs to one model revision and one fit:
the hash carries both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from byline.diffusion.model import DiffusionModel
from byline.errors import ModelNotUsable, TeacherNotUsable
from byline.evaluation.map import mean_average_precision
from byline.features.encoder import Features, Modality, batches, identity_hash, stack
from byline.features.registry import GRADIENT
from byline.teachers.curvature import Curvature
from byline.teachers.files import TeacherFiles, curvature_name
from byline.teachers.first_order import AbuPlusLinear
from byline.teachers.gradient_basis import FOLDER, GradientBasis, GradientSettings, item_features
from byline.teachers.gradient_fold import FoldedFeatures
from byline.teachers.item_gradients import GradientBlock, ItemGradients, Objective
from byline.teachers.layers import select_layers
from byline.teachers.noise import NoiseScheme
from byline.teachers.ranking import Progress, TeacherItem, TeacherQuery, ignore_progress
from byline.teachers.token_gradients import TokenGradients

NAME = GRADIENT
#: Key of the draws: never that of a teacher's noise, so that a student is not judged on noise it was taught with.
NOISE_KEY = "feature"
#: A negative id: latents of a pair are not remembered.
_NO_ITEM = -1
#: Pairs in a block: their gradients multiplied out are 1.5 MB each on the demo.
_BLOCK = 16


class Gradient:
    """The gradient feature of pairs of image and text; an item and a query are treated alike."""

    name = NAME
    modality: Modality = "pair"

    def __init__(self, model: DiffusionModel, curvature: Curvature, basis: GradientBasis) -> None:
        """ModelNotUsable when curvature and basis do not belong together."""
        if curvature.name != basis.preconditioner or model.revision != basis.model_revision:
            raise ModelNotUsable(
                f"the gradient basis was fitted with the curvature {basis.preconditioner} of model revision "
                f"{basis.model_revision}, not with {curvature.name}: run `byline sketches fit --again`"
            )
        if basis.fingerprint and curvature.fingerprint(basis.layers) != basis.fingerprint:
            raise ModelNotUsable(
                f"the gradient basis was fitted with another fit of the curvature {basis.preconditioner}, of another "
                "state of the corpus or by another machine: copy its folder from where the basis was fitted to this "
                "machine's cache (or beside the model), or run `byline sketches fit --again`"
            )
        settings = basis.settings
        scheme = NoiseScheme("shared", settings.seed, settings.draws, 1, settings.antithetic)
        layers = select_layers(model.unet, basis.selection)
        self._gradients = ItemGradients(
            model, layers, scheme, batch=64, objective=cast(Objective, settings.objective)
        )
        self._curvature = curvature
        self._basis = basis
        self._directions = basis.directions().to(model.device)
        reads_text = all(layers[name].reads_text for name in basis.layers)
        self._folded = FoldedFeatures.of(basis, curvature, self._directions) if reads_text else None
        self.dim = basis.dimensions
        self.preprocessing_hash = identity_hash(name=NAME, revision=model.revision, basis=basis.name, key=NOISE_KEY)

    @classmethod
    def load(cls, model: DiffusionModel, files: TeacherFiles | None = None) -> Gradient:
        """From what lies beside the model or in ``files``. ModelNotUsable when there is no basis yet."""
        files = files or TeacherFiles(model.directory, model.directory)
        folder = files.find(FOLDER, model.revision)
        if folder is None:
            raise ModelNotUsable(
                f"encoder {NAME} needs a gradient basis of model revision {model.revision}, and there is none in "
                f"{model.directory} or {files.cache}: run `byline sketches fit`, or leave it out of the feature spec"
            )
        basis = GradientBasis.load(folder, model.revision)
        place = files.find(curvature_name(basis.selection), model.revision)
        if place is None:
            raise ModelNotUsable(f"the curvature {basis.preconditioner} is missing: run `byline sketches fit`")
        return cls(model, Curvature.load(place, model.revision).to(model.device), basis)

    def fidelity(self, queries: Sequence[TeacherQuery], tokens: TokenGradients, truth: NDArray[np.float32]
                 ) -> dict[str, float]:  # fmt: skip
        """How near the order by this feature comes to ``truth`` [q, n] for the items of ``tokens``.

        The items' features are from their stored gradients, of many draws, the queries' from this encoder's few.
        """
        asked = self.encode([query.image for query in queries], [query.prompt for query in queries])
        scores = asked @ item_features(self._basis, tokens, self._curvature).T
        found = {f"map{top}": mean_average_precision(scores, truth, min(top, len(tokens))).mean for top in (20, 100)}
        return {**found, "queries": float(len(queries)), "draws": float(self._basis.settings.draws)}

    def encode(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Features:
        """Features [n, dim] of the pairs; their inner product is a cheap estimate of tau x N."""
        return stack((self._encode(images[part], texts[part]) for part in batches(len(images), _BLOCK)), self.dim)

    def natural(self, images: Sequence[Image.Image], texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """The natural gradients of the pairs that the features are cut from, per layer [n, rows, columns]."""
        return self._curvature.precondition(self._plain(images, texts), self._basis.settings.damping)

    def _encode(self, images: Sequence[Image.Image], texts: Sequence[str]) -> torch.Tensor:
        if self._folded is not None:
            return self._folded.features(self._block(images, texts))
        return self._basis.features(self._plain(images, texts), self._curvature, self._directions)

    def _plain(self, images: Sequence[Image.Image], texts: Sequence[str]) -> dict[str, torch.Tensor]:
        block = self._block(images, texts)
        return {name: block.gradients(name) for name in self._basis.layers}

    def _block(self, images: Sequence[Image.Image], texts: Sequence[str]) -> GradientBlock:
        pairs = [TeacherItem(_NO_ITEM, image, text) for image, text in zip(images, texts, strict=True)]
        return self._gradients.block(pairs, key=NOISE_KEY)


def fit_gradient_feature(
    teacher: AbuPlusLinear, tokens: TokenGradients, queries: Sequence[TeacherQuery], truth: NDArray[np.float32] | None,
    directory: Path, *, dimensions: int = 768, seed: int = 0, progress: Progress = ignore_progress,
) -> dict[str, float]:  # fmt: skip
    """Fit the basis of this encoder from stored token gradients and write it into ``directory``.

    ``truth`` [q, n] is what the teacher says of the items of ``tokens`` for ``queries``. Returns the fidelity, which
    stands in the manifest too; empty without queries. Raises TeacherNotUsable for other curvature than EK-FAC.
    """
    curvature, settings = teacher.curvature, teacher.settings
    if not isinstance(curvature, Curvature):
        raise TeacherNotUsable("the gradient feature needs EK-FAC curvature")
    how = GradientSettings(
        settings.objective, settings.damping, seed=seed, antithetic=settings.objective == "denoising"
    )
    basis = GradientBasis.fit(tokens, curvature, how, dimensions=dimensions, seed=seed, progress=progress)
    encoder = Gradient(teacher.model, curvature, basis)
    fidelity = {} if truth is None else encoder.fidelity(queries, tokens, truth)
    basis.save(directory, fidelity)
    return fidelity
