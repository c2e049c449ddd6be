"""``minilm``: a sentence embedding whose weights install from the package index.

Why it exists: the demo must understand captions without downloading a model. Mean-pooled, unit norm, 384 numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from byline.diffusion.text_encoding import MINILM_SHA256_FIRST16, minilm_directory
from byline.features.encoder import Features, Modality, batches, freeze, identity_hash, stack

DIM = 384
# As the model was trained (its sentence_bert_config.json).
MAX_TOKENS = 256


class MiniLM:
    """all-MiniLM-L6-v2: token states averaged over the real tokens, then normalised."""

    name = "minilm"
    dim = DIM
    modality: Modality = "text"

    def __init__(self, network: Any, tokenizer: Any, device: str) -> None:
        self._network = network
        self._tokenizer = tokenizer
        self._device = device
        self.preprocessing_hash = identity_hash(
            name=self.name, pooling="mean", normalised=True, max_tokens=MAX_TOKENS, weights=MINILM_SHA256_FIRST16
        )

    @classmethod
    def load(cls, device: str) -> MiniLM:
        """Load the installed weights. ModelNotUsable when they are missing or not the pinned ones."""
        from transformers import AutoModel, AutoTokenizer

        folder = minilm_directory()
        network = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        return cls(freeze(network, device), AutoTokenizer.from_pretrained(folder, local_files_only=True), device)

    def encode(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Features:
        """Features [n, 384] of the texts; images are ignored."""
        return stack((self._encode(list(texts[rows])) for rows in batches(len(texts))), DIM)

    @torch.inference_mode()
    def _encode(self, texts: list[str]) -> torch.Tensor:
        tokens = self._tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        tokens = {name: tensor.to(self._device) for name, tensor in tokens.items()}
        states = self._network(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None].to(states)
        mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
        return torch.nn.functional.normalize(mean, dim=1)
