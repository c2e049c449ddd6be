"""Latents of corpus items, encoded once while memory allows.

Why it exists: every pass over the corpus would encode every picture again; a latent is a few kilobytes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from PIL import ImageOps

from byline.diffusion.model import DiffusionModel
from byline.teachers.ranking import TeacherItem


class LatentCache:
    """Least recently used latents by (item id, orientation), at most ``limit`` bytes of them.

    Negative item ids stand for pictures outside the corpus (queries) and are never kept.
    """

    def __init__(self, model: DiffusionModel, limit: int = 64 << 20) -> None:
        """Empty."""
        self._model = model
        self._room = max(1, limit // (4 * torch.Size(model.latent_shape).numel()))
        self._held: OrderedDict[tuple[int, bool], torch.Tensor] = OrderedDict()

    def encode(self, items: Sequence[TeacherItem], flipped: bool = False) -> torch.Tensor:
        """Latents [n, c, h, w] of ``items``, of their mirror images when ``flipped``."""
        known = {i: self._held[key] for i, item in enumerate(items) if (key := (item.item_id, flipped)) in self._held}
        missing = [i for i in range(len(items)) if i not in known]
        pictures = [ImageOps.mirror(items[i].image) if flipped else items[i].image for i in missing]
        found = dict(zip(missing, self._model.encode_images(pictures), strict=True)) if missing else {}
        for i, item in enumerate(items):
            if item.item_id >= 0:
                self._held[item.item_id, flipped] = known[i] if i in known else found[i].clone()
                self._held.move_to_end((item.item_id, flipped))
        while len(self._held) > self._room:
            self._held.popitem(last=False)
        rows = [known[i] if i in known else found[i] for i in range(len(items))]
        return torch.stack(rows) if rows else torch.empty(0, *self._model.latent_shape, device=self._model.device)
