"""Exact search on a GPU: torch, or faiss-gpu where it is installed.

Why it exists: a GPU reads a million vectors in a millisecond. It proposes candidates; scores, ties and the proof that
nothing was missed come from the exact store on the host (see ``scan``), so an index answers the same on any device.
"""

from __future__ import annotations

import threading
from typing import Any, Protocol

import faiss
import numpy as np
from numpy.typing import NDArray

from byline.index.exact_store import native
from byline.index.flat import FlatIndex
from byline.index.protocol import Positions, Vectors


class TorchScan:
    """Matrix product and top-k in torch; the vectors are copied to ``device`` once."""

    max_depth = 65_536
    filters = True
    #: Scores held at a time: 64 queries against ten million vectors are 2.5 GB.
    scores_at_once = 2**30

    def __init__(self, rows: Vectors, device: str) -> None:
        """``rows`` [n, d]; raises torch's own error when they do not fit."""
        import torch

        self._torch = torch
        self._rows = torch.from_numpy(np.array(rows)).to(device)  # a copy: mapped memory is not writable

    @property
    def unit(self) -> float:
        """2^-24; where the process allows TF32 on this device 2^-11, with which hardly anything can be proven: the
        answers stay right and become slow. Leave TF32 off."""
        tf32 = self._rows.is_cuda and self._torch.backends.cuda.matmul.allow_tf32
        return 2.0**-11 if tf32 else 2.0**-24

    def top(self, queries: Vectors, depth: int, mask: NDArray[np.bool_] | None) -> tuple[Vectors, Positions]:
        """See ``Scan``."""
        forbidden = None if mask is None else self._torch.from_numpy(~mask).to(self._rows.device)
        step = max(1, self.scores_at_once // max(4 * len(self._rows), 1))
        scores, positions = [], []
        for start in range(0, len(queries), step):
            asked = self._torch.from_numpy(queries[start : start + step]).to(self._rows.device)
            product = asked @ self._rows.T  # [q, n]
            if forbidden is not None:
                product.masked_fill_(forbidden, -self._torch.inf)
            found = product.topk(depth, dim=1, sorted=False)
            scores.append(found.values.cpu().numpy())
            positions.append(found.indices.cpu().numpy())
        return np.concatenate(scores), np.concatenate(positions)


class GpuEngine(Protocol):
    """The part of a faiss-gpu index that is used here."""

    def search(self, queries: Vectors, depth: int) -> tuple[Vectors, Positions]:
        """Scores and positions [q, depth]."""


class FaissGpuScan:
    """faiss-gpu. Its flat index knows no filter, so forbidden items are asked for and dropped."""

    max_depth = 2048
    filters = False
    unit = 2.0**-24

    def __init__(self, engine: GpuEngine) -> None:
        self._engine = engine
        self._one_at_a_time = threading.Lock()  # GPU indexes are not safe for concurrent searches

    def top(self, queries: Vectors, depth: int, mask: NDArray[np.bool_] | None) -> tuple[Vectors, Positions]:
        """See ``Scan``."""
        with self._one_at_a_time:
            return self._engine.search(queries, depth)


def faiss_gpu_engine(flat: Any, module: Any = faiss) -> GpuEngine | None:
    """``flat`` copied to the first GPU by faiss-gpu; None where that is not installed or sees no GPU."""
    if not hasattr(module, "StandardGpuResources") or module.get_num_gpus() == 0:
        return None
    resources = module.StandardGpuResources()
    return _Held(resources, module.index_cpu_to_gpu(resources, 0, flat))


class _Held:
    """A GPU index and the resources it lives on, which FAISS does not keep for it."""

    def __init__(self, resources: Any, index: Any) -> None:
        self._resources = resources
        self._index = index

    def search(self, queries: Vectors, depth: int) -> tuple[Vectors, Positions]:
        scores, positions = self._index.search(queries, depth)
        return scores, positions


def on_device(index: FlatIndex, device: str) -> FlatIndex:
    """``index`` scanned on ``device``: as it is for ``cpu``, by faiss-gpu where installed, else by torch."""
    if device == "cpu":
        return index
    engine = faiss_gpu_engine(index.store.flat, native) if device.startswith("cuda") else None
    return index.scanned_by(FaissGpuScan(engine) if engine is not None else TorchScan(index.store.rows, device))
