"""The items' gradients of a study, kept on disk: one pass of an hour judges variants nobody has thought of yet.

Why it exists: curvature, damping, layers and queries all come after the items' gradients. At a study's size they fit on
a disk (items x parameters x 4 bytes: 3 GB for the small study, 41 GB for the fuller one), so a pass is made once per
aggregation and objective and every first-order or kernel teacher is a product with it. ``AbuPlusLinear`` gives the same
numbers without keeping anything; a test compares them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from byline.diffusion.model import DiffusionModel
from byline.teachers.item_gradients import Aggregation, ItemGradients, Objective
from byline.teachers.layers import EditableLayer
from byline.teachers.noise import NoiseScheme
from byline.teachers.ranking import Progress, TeacherItem
from byline.teachers.row_store import RowStore, digest_of

DoubleArray = np.ndarray[Any, np.dtype[np.float64]]
#: Items whose gradients are in memory at once.
_CHUNK = 16


@dataclass(frozen=True)
class StoredGradients:
    """Mean gradients float32 [n, parameters] of a corpus; ``places`` says which columns are a layer's."""

    rows: Any
    places: dict[str, slice]

    def products(self, layer: str, directions: torch.Tensor) -> DoubleArray:
        """<gradient of item, direction> of one layer, [n, k]; directions [k, rows, columns]."""
        flat = directions.flatten(1).T.cpu().contiguous()
        part = torch.from_numpy(np.ascontiguousarray(self.rows[:, self.places[layer]]))
        return np.asarray((part @ flat).double().numpy())

    def gram(self, layer: str) -> DoubleArray:
        """<gradient, gradient> of all pairs of items for one layer, [n, n]."""
        part = torch.from_numpy(np.ascontiguousarray(self.rows[:, self.places[layer]]))
        return np.asarray((part @ part.T).double().numpy())


def store_gradients(
    model: DiffusionModel,
    layers: dict[str, EditableLayer],
    items: Sequence[TeacherItem],
    scheme: NoiseScheme,
    path: Path,
    *,
    aggregation: Aggregation = "sum",
    objective: Objective = "denoising",
    progress: Progress = lambda done, total: None,
) -> StoredGradients:
    """Gradients of all ``items``, read from ``path`` where they are there; a killed pass goes on where it stopped."""
    places: dict[str, slice] = {}
    at = 0
    for name, layer in layers.items():
        places[name] = slice(at, at := at + layer.rows * layer.columns)
    identity = digest_of(f"{objective}/{aggregation}/{scheme.name}/{model.revision}/{list(layers)}", items, {})
    store = RowStore.open(path, (len(items), at), np.float32, identity)
    gradients = ItemGradients(model, layers, scheme, aggregation=aggregation, objective=objective)
    for start in range(0, len(items), _CHUNK):
        rows = slice(start, min(start + _CHUNK, len(items)))
        if not store.written[rows].all():
            block = gradients.block(items[rows])
            parts = [block.gradients(name).flatten(1).cpu() for name in layers]
            store.put(rows, torch.cat(parts, dim=1).numpy())
        progress(rows.stop, len(items))
    return StoredGradients(store.rows, places)
