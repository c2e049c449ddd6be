"""Encoder names and how each is loaded.

Why it exists: a study compares features by changing a name; adding an encoder is one entry here and nothing
elsewhere. Heavy imports happen when an encoder is loaded, not when its name is looked up.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

from byline.errors import FeatureMismatch, ModelNotUsable
from byline.features.denoiser import Denoiser, DenoisingModel
from byline.features.efficientnet import EfficientNetLite0
from byline.features.encoder import Encoder
from byline.features.minilm import MiniLM
from byline.features.pretrained import FAMILIES, PretrainedEncoder
from byline.features.prompt_gain import NAME as PROMPT_GAIN
from byline.features.prompt_gain import LossModel, PromptGain

#: Its module imports teachers, which import this one; it is loaded when asked for.
GRADIENT = "gradient"
Loader = Callable[[str, Path | str | None, DenoisingModel | None], Encoder]


def _pretrained(name: str) -> Loader:
    return lambda device, source, model: PretrainedEncoder.load(name, source, device)


def _denoiser(device: str, source: Path | str | None, model: DenoisingModel | None) -> Encoder:
    if model is None:
        raise ModelNotUsable("encoder denoiser needs the attributed model: pass model=DiffusionModel.load(directory)")
    return Denoiser(model)


def _prompt_gain(device: str, source: Path | str | None, model: DenoisingModel | None) -> Encoder:
    if model is None:
        raise ModelNotUsable("prompt_gain needs the attributed model: pass model=DiffusionModel.load(directory)")
    return PromptGain(cast(LossModel, model))


def _gradient(device: str, source: Path | str | None, model: DenoisingModel | None) -> Encoder:
    from byline.diffusion.model import DiffusionModel
    from byline.features.gradient import Gradient
    from byline.teachers.files import TeacherFiles

    if not isinstance(model, DiffusionModel):
        raise ModelNotUsable("encoder gradient needs the attributed model: pass model=DiffusionModel.load(directory)")
    files = None if source is None else TeacherFiles.beside(model.directory, Path(source), model.revision)
    return Gradient.load(model, files)


ENCODERS: dict[str, Loader] = {
    "efficientnet_lite0": lambda device, source, model: EfficientNetLite0.load(device),
    "minilm": lambda device, source, model: MiniLM.load(device),
    "denoiser": _denoiser,
    GRADIENT: _gradient,
    **{name: _pretrained(name) for name in FAMILIES},
}
#: Encoders that are a part of the attributed model, or made from it.
OF_THE_MODEL = frozenset({"denoiser", GRADIENT})
#: One number about a whole query, not a place in a space: for abstention only, never compared, no part of a head.
EVIDENCE: dict[str, Loader] = {PROMPT_GAIN: _prompt_gain}


def load_encoder(
    name: str, *, device: str = "cpu", source: Path | str | None = None, model: DenoisingModel | None = None
) -> Encoder:
    """Load one encoder. ``source``: hub name or directory for the transformers ones, the cache directory in which fits
    lie for ``gradient``; ``model``: for those of ``OF_THE_MODEL``.

    FeatureMismatch for an unknown name, ModelNotUsable when weights are missing or not the pinned ones.
    """
    return _load(ENCODERS, name, device, source, model)


def needs_model(spec: str) -> bool:
    """Whether the encoders of a spec (``denoiser+minilm``) include one of ``OF_THE_MODEL``."""
    return not OF_THE_MODEL.isdisjoint(spec.split("+"))


def load_evidence_encoder(name: str, *, device: str = "cpu", model: DenoisingModel | None = None) -> Encoder:
    """Load one of ``EVIDENCE``; errors as of :func:`load_encoder`."""
    return _load(EVIDENCE, name, device, None, model)


def _load(known: dict[str, Loader], name: str, device: str, source: Path | str | None,
          model: DenoisingModel | None) -> Encoder:
    if name not in known:
        raise FeatureMismatch(f"unknown encoder {name!r}; known: {', '.join(sorted(known))}", encoder=name)
    return known[name](device, source, model)
