"""``dino``, ``dinov2``, ``clip_image``, ``clip_text``: transformers models from a hub name or a local folder.

Why it exists: the paper's features (DINO CLS and CLIP text) are published weights of other people. A source
is ``owner/name``, ``owner/name@revision`` or a directory; only safetensors are read, and images are prepared
by the PIL code on every machine, so that one with torchvision does not see other pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from byline.errors import ModelNotUsable
from byline.features.encoder import Features, Modality, batches, freeze, identity_hash, stack, weights_hash


@dataclass(frozen=True, slots=True)
class Pretrained:
    """One family: its class in transformers, where it is published, and how a feature is read from its output."""

    model_class: str
    default_source: str
    modality: Modality
    dim_of: Callable[[Any], int]
    feature_of: Callable[[Any], torch.Tensor]


def _cls_token(output: Any) -> torch.Tensor:
    state: torch.Tensor = output.last_hidden_state[:, 0]
    return state


FAMILIES: dict[str, Pretrained] = {
    "dino": Pretrained("ViTModel", "facebook/dino-vitb16", "image", lambda c: int(c.hidden_size), _cls_token),
    "dinov2": Pretrained("Dinov2Model", "facebook/dinov2-base", "image", lambda c: int(c.hidden_size), _cls_token),
    "clip_image": Pretrained(
        "CLIPVisionModelWithProjection", "openai/clip-vit-base-patch32", "image",
        lambda c: int(c.projection_dim), lambda output: output.image_embeds,
    ),
    "clip_text": Pretrained(
        "CLIPTextModelWithProjection", "openai/clip-vit-base-patch32", "text",
        lambda c: int(c.projection_dim), lambda output: output.text_embeds,
    ),
}  # fmt: skip


class PretrainedEncoder:
    """One of ``FAMILIES`` with its weights and its processor or tokenizer."""

    def __init__(self, name: str, network: Any, processor: Any, device: str) -> None:
        self._family = FAMILIES[name]
        self._network = network
        self._processor = processor
        self._device = device
        self.name = name
        self.dim = self._family.dim_of(network.config)
        self.modality = self._family.modality
        self.preprocessing_hash = identity_hash(
            name=name, preparation=self._preparation(), weights=weights_hash(network)
        )

    @classmethod
    def load(cls, name: str, source: Path | str | None, device: str) -> PretrainedEncoder:
        """Load a family member. ModelNotUsable when the source cannot be loaded or is another kind of model."""
        import transformers

        family = FAMILIES[name]
        where, options = _locate(source or family.default_source)
        try:
            network, report = getattr(transformers, family.model_class).from_pretrained(
                where, use_safetensors=True, output_loading_info=True, **options
            )
            if family.modality == "image":
                processors: Any = transformers.AutoImageProcessor  # untyped upstream
                processor = processors.from_pretrained(where, backend="pil", **options)
            else:
                processor = transformers.AutoTokenizer.from_pretrained(where, **options)
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            raise ModelNotUsable(
                f"encoder {name} cannot be loaded from {where}: {str(error).splitlines()[0][:200]}", encoder=name
            ) from error
        # The pooler is not used; anything else missing would be random numbers in place of weights.
        missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
        if missing:
            raise ModelNotUsable(f"{where} lacks weights of encoder {name}: {', '.join(missing[:3])}", encoder=name)
        return cls(name, freeze(network, device), processor, device)

    def encode(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Features:
        """Features [n, dim] of the images or the texts, whichever this encoder looks at."""
        if self.modality == "image":
            return stack((self._encode_images(list(images[rows])) for rows in batches(len(images))), self.dim)
        return stack((self._encode_texts(list(texts[rows])) for rows in batches(len(texts))), self.dim)

    @torch.inference_mode()
    def _encode_images(self, images: list[Image.Image]) -> torch.Tensor:
        pixels = self._processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        return self._family.feature_of(self._network(pixel_values=pixels["pixel_values"].to(self._device)))

    @torch.inference_mode()
    def _encode_texts(self, texts: list[str]) -> torch.Tensor:
        # Padded to the full length: how much padding a text gets must not depend on its neighbours.
        tokens = self._processor(
            texts, padding="max_length", truncation=True, max_length=self._max_tokens, return_tensors="pt"
        )
        output = self._network(
            input_ids=tokens["input_ids"].to(self._device), attention_mask=tokens["attention_mask"].to(self._device)
        )
        return self._family.feature_of(output)

    @property
    def _max_tokens(self) -> int:
        return int(self._network.config.max_position_embeddings)

    def _preparation(self) -> str:
        if self.modality == "text":
            return f"max_tokens={self._max_tokens}, vocabulary={len(self._processor)}"
        settings = {k: v for k, v in self._processor.to_dict().items() if k not in ("_processor_class", "backend")}
        return json.dumps(settings, sort_keys=True, default=str)


def _locate(source: Path | str) -> tuple[str, dict[str, Any]]:
    """What to pass to ``from_pretrained``: a directory as it is, a hub name with its pinned revision."""
    if Path(source).is_dir():
        return str(source), {"local_files_only": True}
    if isinstance(source, Path):
        raise ModelNotUsable(f"{source} is not a directory", path=source)
    name, _, revision = source.partition("@")
    return name, {"revision": revision} if revision else {}
