"""Write a complete text-to-image pipeline directory with random weights, a few hundred kB in size.

Why it exists: tests and dry runs of a deployment need the real loading code, the real UNet and the
real teacher at a size where a loss costs a millisecond. The pictures it makes are noise; every
exactness property (sign, linearity, batch independence, resume) holds on it as on any other model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch


def write_tiny_pipeline(
    directory: Path, *, text: Literal["clip", "minilm"] = "clip", seed: int = 0, channels: int = 16
) -> Path:
    """A pipeline in Stable Diffusion's layout (``clip``) or the demo's (``minilm``); returns ``directory``."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

    torch.manual_seed(seed)
    width = 32 if text == "clip" else 384
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(channels, channels),
        layers_per_block=1,
        cross_attention_dim=width,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=8,
    )
    unet.save_pretrained(directory / "unet")
    vae.save_pretrained(directory / "vae")
    DDPMScheduler(num_train_timesteps=1000, prediction_type="epsilon").save_pretrained(directory / "scheduler")
    index: dict[str, object] = {
        "_class_name": "StableDiffusionPipeline",
        "vae": ["diffusers", "AutoencoderKL"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    if text == "minilm":
        (directory / "byline.json").write_text(json.dumps({"text_encoder": "minilm", "max_tokens": 8}))
    else:
        _write_clip_text(directory, width)
        index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    (directory / "model_index.json").write_text(json.dumps(index))
    return directory


def _write_clip_text(directory: Path, width: int) -> None:
    """A one-layer CLIP text model and a word-level tokenizer that knows a hundred small words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    words = ["<pad>", "<start>", "<end>", "<unk>", *"a an the of on in red blue green cat dog flag car fish".split()]
    words += [f"w{i}" for i in range(100)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    special = {"pad_token": "<pad>", "bos_token": "<start>", "eos_token": "<end>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **special,
        model_max_length=8,
    )  # fmt: skip
    fast.save_pretrained(directory / "tokenizer")
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=8, projection_dim=width,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(directory / "text_encoder")
