"""The head: frozen features in, attribution embedding out; inner product high = influential.

Why it exists: one small network is all that is learnt, shared by query and item. It begins as the cosine of the
standardised raw features (a residual path), so that with few labels it can only be better than they are, and folds
what makes an item influential for *every* query into one extra dimension, so that the index stays a plain
inner-product search.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from byline.errors import FeatureMismatch, ReleaseCorrupt

FloatArray = npt.NDArray[np.float32]
HEAD_FORMAT = "byline-head-1"


@dataclass(frozen=True)
class FeatureBlock:
    """One encoder's columns within a feature row; ``weight`` is its initial weight in the residual path."""

    name: str
    dim: int
    weight: float = 1.0


@dataclass(frozen=True)
class HeadConfig:
    """Shape of a head. ``residual`` and ``item_prior`` off, with one block, is the published architecture."""

    in_dim: int
    blocks: tuple[FeatureBlock, ...]
    hidden: tuple[int, ...] = (768, 768, 768)
    out_dim: int = 768
    dropout: float = 0.1
    residual: bool = True
    item_prior: bool = True
    #: Centre queries by their own mean: generated images and real ones differ by a constant shift in most encoders.
    own_query_mean: bool = True

    def __post_init__(self) -> None:
        if sum(block.dim for block in self.blocks) != self.in_dim:
            raise FeatureMismatch(f"feature blocks sum to {sum(b.dim for b in self.blocks)}, not in_dim {self.in_dim}")
        if self.out_dim < 1 or not 0.0 <= self.dropout < 1.0:
            raise FeatureMismatch("out_dim must be positive and dropout in [0, 1)")

    @property
    def embedding_dim(self) -> int:
        """Width of an embedding: ``out_dim`` plus one for the item prior."""
        return self.out_dim + int(self.item_prior)

    def to_json(self) -> str:
        """Text form kept in the metadata of ``head.safetensors``."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> HeadConfig:
        """Inverse of :meth:`to_json`."""
        raw = json.loads(text)
        raw["blocks"] = tuple(FeatureBlock(**block) for block in raw["blocks"])
        raw["hidden"] = tuple(raw["hidden"])
        return cls(**raw)


class Head(nn.Module):
    """Shared tower for queries and items. Use :meth:`embed_queries` and :meth:`embed_items` outside of training."""

    item_mean: Tensor
    query_mean: Tensor
    scale: Tensor

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("item_mean", torch.zeros(config.in_dim))
        self.register_buffer("query_mean", torch.zeros(config.in_dim))
        self.register_buffer("scale", torch.ones(config.in_dim))
        layers: list[nn.Module] = []
        width = config.in_dim
        for hidden in config.hidden:
            layers += [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(config.dropout)]
            width = hidden
        self.trunk = nn.Sequential(*layers)
        self.output = nn.Linear(width, config.out_dim)
        self.block_log_weight = nn.Parameter(torch.log(torch.tensor([b.weight for b in config.blocks])))
        self.residual = nn.Parameter(torch.zeros(config.in_dim, config.out_dim)) if config.residual else None
        self.prior = nn.Linear(width + config.in_dim, 1) if config.item_prior else None

    def initialise(self, item_features: FloatArray, query_features: FloatArray, generator: torch.Generator) -> None:
        """Set standardisation from data and weights from ``generator``.

        ``item_features`` [n, in], ``query_features`` [q, in]. With ``residual``, the head then orders items exactly
        by the raw cosine (:meth:`raw_vectors`) if ``out_dim >= in_dim``, and by its best projection otherwise.
        """
        items = torch.from_numpy(np.ascontiguousarray(item_features, dtype=np.float32))
        with torch.no_grad():
            self.item_mean.copy_(items.mean(0))
            queries = np.asarray(query_features, dtype=np.float32)
            own = self.config.own_query_mean and queries.shape[0] > 0
            self.query_mean.copy_(torch.from_numpy(queries.mean(0)) if own else self.item_mean)
            deviation = items.std(0, correction=0)
            # A constant dimension says nothing: scale it to zero instead of dividing by nearly nothing.
            self.scale.copy_(torch.where(deviation > 1e-6, 1.0 / deviation.clamp_min(1e-6), 0.0))
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight, generator=generator)
                    bound = module.in_features**-0.5
                    module.bias.uniform_(-bound, bound, generator=generator)
            if self.prior is not None:
                self.prior.weight.zero_()
                self.prior.bias.zero_()
            if self.residual is not None:
                self.output.weight.zero_()
                self.output.bias.zero_()
                self.residual.copy_(_start_projection(self._raw(self._standardise(items, self.item_mean)),
                                                      self.config.out_dim))

    def query_embedding(self, features: Tensor) -> Tensor:
        """Differentiable embedding of queries: [b, in] → [b, embedding_dim]."""
        z = self._standardise(features, self.query_mean)
        direction = self._direction(z, self.trunk(z))
        if self.prior is None:
            return direction
        return torch.cat([direction, direction.new_ones(direction.shape[0], 1)], dim=1)

    def item_embedding(self, features: Tensor) -> Tensor:
        """Differentiable embedding of items: [b, in] → [b, embedding_dim]."""
        z = self._standardise(features, self.item_mean)
        hidden = self.trunk(z)
        direction = self._direction(z, hidden)
        if self.prior is None:
            return direction
        # Divided by the width so that all weights moving together by one step do not swamp the cosine.
        joined = torch.cat([hidden, z], dim=1)
        return torch.cat([direction, self.prior(joined * joined.shape[1] ** -0.5)], dim=1)

    def embed_queries(self, features: FloatArray, batch: int = 1024) -> FloatArray:
        """Embeddings of queries [q, in] → [q, embedding_dim] float32, without dropout or gradients."""
        return self._embed(features, batch, queries=True)

    def embed_items(self, features: FloatArray, batch: int = 1024) -> FloatArray:
        """Embeddings of items [n, in] → [n, embedding_dim] float32, without dropout or gradients."""
        return self._embed(features, batch, queries=False)

    def scores(self, query_features: FloatArray, item_features: FloatArray, batch: int = 1024) -> FloatArray:
        """Predicted influence [q, n] (higher = more influential), an inner product of embeddings."""
        products = self.embed_queries(query_features, batch) @ self.embed_items(item_features, batch).T
        return np.asarray(products, dtype=np.float32)

    def raw_vectors(self, features: FloatArray, *, queries: bool) -> FloatArray:
        """Unit vectors [n, in] of the standardised, block-weighted raw features: the residual path's input."""
        mean = self.query_mean if queries else self.item_mean
        with torch.no_grad():
            z = self._standardise(torch.from_numpy(np.ascontiguousarray(features, dtype=np.float32)), mean)
            return self._raw(z).numpy()

    def _embed(self, features: FloatArray, batch: int, *, queries: bool) -> FloatArray:
        if features.ndim != 2 or features.shape[1] != self.config.in_dim:
            raise FeatureMismatch(f"the head takes rows of {self.config.in_dim} features, got {features.shape}",
                                  expected=self.config.in_dim, got=features.shape)
        was_training = self.training
        self.eval()
        forward = self.query_embedding if queries else self.item_embedding
        out = np.empty((features.shape[0], self.config.embedding_dim), dtype=np.float32)
        with torch.no_grad():
            for start in range(0, features.shape[0], batch):
                rows = np.array(features[start : start + batch], dtype=np.float32)
                out[start : start + batch] = forward(torch.from_numpy(rows)).numpy()
        self.train(was_training)
        return out

    def _standardise(self, features: Tensor, mean: Tensor) -> Tensor:
        # Features of an image unlike the corpus may lie far out; clamping keeps the network where it was trained.
        return ((features - mean) * self.scale).clamp(-8.0, 8.0)

    def _raw(self, z: Tensor) -> Tensor:
        parts = torch.split(z, [block.dim for block in self.config.blocks], dim=1)
        weights = torch.exp(self.block_log_weight)
        weighted = [functional.normalize(part, dim=1, eps=1e-6) * weights[i] for i, part in enumerate(parts)]
        return functional.normalize(torch.cat(weighted, dim=1), dim=1, eps=1e-6)

    def _direction(self, z: Tensor, hidden: Tensor) -> Tensor:
        out: Tensor = self.output(hidden)
        if self.residual is not None:
            out = self._raw(z) @ self.residual + out * self.config.out_dim**-0.5
        return functional.normalize(out, dim=1, eps=1e-6)


def _start_projection(raw: Tensor, out_dim: int) -> Tensor:
    """[in, out_dim] that keeps inner products of ``raw`` [n, in] exactly (out_dim ≥ in) or as well as a basis can."""
    in_dim = raw.shape[1]
    if out_dim >= in_dim:
        return torch.eye(in_dim, out_dim)
    second_moment = raw.double().T @ raw.double()
    _, vectors = torch.linalg.eigh(second_moment)
    leading: Tensor = vectors[:, -out_dim:].flip(1).float()
    return leading


def feature_blocks(names: Sequence[str], dims: Sequence[int]) -> tuple[FeatureBlock, ...]:
    """Blocks of equal initial weight, one per encoder of a FeatureSpec."""
    return tuple(FeatureBlock(name, dim) for name, dim in zip(names, dims, strict=True))


def save_head(head: Head, path: Path) -> None:
    """Write ``head`` as safetensors, its configuration in the file's metadata."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in head.state_dict().items()}
    save_file(tensors, str(path), metadata={"format": HEAD_FORMAT, "config": head.config.to_json()})


def load_head(path: Path) -> Head:
    """Read a head written by :func:`save_head`; raises ReleaseCorrupt if it is not one."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if metadata.get("format") != HEAD_FORMAT:
            raise ReleaseCorrupt(f"{path.name} is not a head of format {HEAD_FORMAT}", file=path.name)
        head = Head(HeadConfig.from_json(metadata["config"]))
        head.load_state_dict(state)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ReleaseCorrupt(f"cannot read the head {path.name}: {error}", file=path.name) from error
    head.eval()
    return head
