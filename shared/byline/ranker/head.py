"""The head: frozen features in, attribution embedding out; inner product high = influential.

Why it exists: one small network is all that is learnt, shared by query and item. It begins as the cosine of the
standardised raw features (a residual path), so that with few labels it can only be better than they are, and folds
what makes an item influential for *every* query into one extra dimension, so that the index stays a plain
inner-product search. A block that estimates influence by itself (``byline.ranker.direct``) does not go through the
network: its columns stand beside the network's, whose weight beside them is ``blend``. An embedding is

    [ direct columns | blend x direction of the network | blend x item prior ]

with each part's leading columns the best smaller part, so that a head can be narrowed without being fitted again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from byline.errors import FeatureMismatch, ReleaseCorrupt
from byline.ranker.direct import DirectPart

FloatArray = npt.NDArray[np.float32]
#: Encoders whose inner product is an estimate of influence already.
DIRECT = frozenset({"gradient"})
#: Columns of the network beside a direct part, at most: 64 say nearly what 512 say (docs/student.md).
BESIDE_DIRECT = 63
HEAD_FORMAT = "byline-head-2"
IntArray = npt.NDArray[np.int64]


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
    #: Name of the block whose inner product is an estimate of influence already; "" for none.
    direct: str = ""
    #: Columns kept of an embedding, as :meth:`Head.narrowed` sets it; 0 for all.
    width: int = 0

    def __post_init__(self) -> None:
        if sum(block.dim for block in self.blocks) != self.in_dim:
            raise FeatureMismatch(f"feature blocks sum to {sum(b.dim for b in self.blocks)}, not in_dim {self.in_dim}")
        if self.out_dim < 1 or not 0.0 <= self.dropout < 1.0:
            raise FeatureMismatch("out_dim must be positive and dropout in [0, 1)")
        if self.direct and self.direct not in [block.name for block in self.blocks]:
            raise FeatureMismatch(f"the direct block {self.direct!r} is none of the feature blocks")
        if not 0 <= self.width <= self.full_dim:
            raise FeatureMismatch(f"an embedding of {self.full_dim} columns cannot be narrowed to {self.width}")

    @property
    def learned(self) -> tuple[FeatureBlock, ...]:
        """The blocks that go through the network."""
        return tuple(block for block in self.blocks if block.name != self.direct)

    @property
    def learned_dim(self) -> int:
        """Their width in all; 0 where the direct block is the only one."""
        return sum(block.dim for block in self.learned)

    @property
    def direct_dim(self) -> int:
        """Width of the direct block; 0 without one."""
        return self.in_dim - self.learned_dim

    @property
    def full_dim(self) -> int:
        """Width of an embedding that is not narrowed: the direct columns, ``out_dim`` and one for the item prior."""
        return self.direct_dim + (self.out_dim + int(self.item_prior) if self.learned else 0)

    @property
    def embedding_dim(self) -> int:
        """Width of an embedding."""
        return self.width or self.full_dim

    @classmethod
    def of_encoders(
        cls, names: Sequence[str], dims: Sequence[int], hidden: tuple[int, ...], out_dim: int, width: int = 0
    ) -> HeadConfig:
        """The head for the encoders of a FeatureSpec: those of ``DIRECT`` beside the network, the others through it."""
        direct = next((name for name in names if name in DIRECT), "")
        blocks = feature_blocks(names, dims)
        config = cls(sum(dims), blocks, hidden, min(out_dim, BESIDE_DIRECT) if direct else out_dim, direct=direct)
        return replace(config, width=0 if width >= config.full_dim else width)

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
    blend: Tensor

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        learned = config.learned_dim
        self.register_buffer("item_mean", torch.zeros(learned))
        self.register_buffer("query_mean", torch.zeros(learned))
        self.register_buffer("scale", torch.ones(learned))
        self.register_buffer("blend", torch.tensor(1.0))
        layers: list[nn.Module] = []
        width = learned
        for hidden in config.hidden if learned else ():
            layers += [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(config.dropout)]
            width = hidden
        self.trunk = nn.Sequential(*layers)
        self.output = nn.Linear(width, config.out_dim) if learned else None
        self.block_log_weight = nn.Parameter(torch.log(torch.tensor([b.weight for b in config.learned])))
        with_residual = config.residual and learned > 0
        self.residual = nn.Parameter(torch.zeros(learned, config.out_dim)) if with_residual else None
        self.prior = nn.Linear(width + learned, 1) if config.item_prior and learned else None
        self.direct = DirectPart(config.direct_dim) if config.direct else None
        self.kept = nested_columns(config, config.embedding_dim)

    def initialise(self, item_features: FloatArray, query_features: FloatArray, generator: torch.Generator) -> None:
        """Set standardisation from data and weights from ``generator``.

        ``item_features`` [n, in], ``query_features`` [q, in]. With ``residual``, the head then orders items exactly
        by the raw cosine (:meth:`raw_vectors`) if ``out_dim >= in_dim``, and by its best projection otherwise;
        a direct part orders them by its inner product, and the network counts as ``blend`` says.
        """
        every = torch.from_numpy(np.ascontiguousarray(item_features, dtype=np.float32))
        asked = torch.from_numpy(np.ascontiguousarray(query_features, dtype=np.float32))
        if self.direct is not None:
            self.direct.initialise(self._direct_columns(every), self._direct_columns(asked))
        if not self.config.learned:
            return
        items, queries = self._learned_columns(every), self._learned_columns(asked)
        with torch.no_grad():
            self.item_mean.copy_(items.mean(0))
            own = self.config.own_query_mean and queries.shape[0] > 0
            self.query_mean.copy_(queries.mean(0) if own else self.item_mean)
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
            if self.residual is not None and self.output is not None:
                self.output.weight.zero_()
                self.output.bias.zero_()
                self.residual.copy_(
                    _start_projection(self._raw(self._standardise(items, self.item_mean)), self.config.out_dim)
                )

    def query_embedding(self, features: Tensor) -> Tensor:
        """The network's part for queries, differentiable: [b, in] → [b, out_dim, and one for the item prior]."""
        z = self._standardise(self._learned_columns(features), self.query_mean)
        direction = self._direction(z, self.trunk(z))
        if self.prior is None:
            return direction
        return torch.cat([direction, direction.new_ones(direction.shape[0], 1)], dim=1)

    def item_embedding(self, features: Tensor) -> Tensor:
        """The network's part for items, differentiable: [b, in] → [b, out_dim, and one for the item prior]."""
        z = self._standardise(self._learned_columns(features), self.item_mean)
        hidden = self.trunk(z)
        direction = self._direction(z, hidden)
        if self.prior is None:
            return direction
        # Divided by the width so that all weights moving together by one step do not swamp the cosine.
        joined = torch.cat([hidden, z], dim=1)
        return torch.cat([direction, self.prior(joined * joined.shape[1] ** -0.5)], dim=1)

    def narrowed(self, width: int) -> Head:
        """The same head with embeddings of ``width`` columns, the best of each part; nothing is fitted again."""
        # New layers draw weights that are overwritten at once: not from the caller's random stream.
        with torch.random.fork_rng(devices=[]):
            other = Head(replace(self.config, width=0 if width == self.config.full_dim else width))
        other.load_state_dict(self.state_dict())
        return other.eval()

    def order_columns(self, item_features: FloatArray) -> None:
        """Turn the network's output so that its leading columns matter most. No score changes.

        Items [n, in] say what matters: the columns become the principal axes of their directions.
        """
        if self.output is None:
            return
        was_training = self.training
        self.eval()
        with torch.no_grad():
            vectors = self.item_embedding(torch.from_numpy(np.array(item_features, dtype=np.float32)))
            directions = vectors[:, : self.config.out_dim].double()
            turn = torch.linalg.eigh(directions.T @ directions).eigenvectors.flip(1)  # [out, out], orthogonal
            self.output.weight.copy_((turn.T @ self.output.weight.double()).float())
            self.output.bias.copy_((turn.T @ self.output.bias.double()).float())
            if self.residual is not None:
                self.residual.copy_((self.residual.double() @ turn).float())
        self.train(was_training)

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

    def set_powers(self, exponent: float, temper: float, item_features: FloatArray, query_features: FloatArray) -> None:
        """The direct part's powers (``byline.ranker.direct``), for features of items [n, in] and queries [q, in]."""
        if self.direct is not None:
            items, queries = (self._direct_columns(torch.from_numpy(np.array(f, dtype=np.float32)))
                              for f in (item_features, query_features))  # fmt: skip
            self.direct.set_powers(exponent, temper, items, queries)

    def direct_scores(self, query_features: FloatArray, item_features: FloatArray) -> FloatArray:
        """What the direct part alone predicts [q, n]; zeros without one."""
        if self.direct is None:
            return np.zeros((len(query_features), len(item_features)), dtype=np.float32)
        queries, items = (self._direct_columns(torch.from_numpy(np.array(f, dtype=np.float32)))
                          for f in (query_features, item_features))  # fmt: skip
        kept = self.kept[self.kept < self.config.direct_dim]
        return (self.direct.queries(queries)[:, kept] @ self.direct.items(items)[:, kept].T).numpy()

    def learned_scores(self, query_features: FloatArray, item_features: FloatArray, batch: int = 1024) -> FloatArray:
        """What the network alone predicts [q, n], of weight 1; zeros without one."""
        if self.output is None:
            return np.zeros((len(query_features), len(item_features)), dtype=np.float32)
        kept = self.kept[self.kept >= self.config.direct_dim] - self.config.direct_dim
        queries = self._rows(query_features, batch, self.query_embedding)[:, kept]
        items = self._rows(item_features, batch, self.item_embedding)[:, kept]
        return np.asarray(queries @ items.T, dtype=np.float32)

    def raw_vectors(self, features: FloatArray, *, queries: bool) -> FloatArray:
        """Unit vectors [n, learned_dim] of the standardised, block-weighted raw features: the residual path's input."""
        mean = self.query_mean if queries else self.item_mean
        with torch.no_grad():
            rows = self._learned_columns(torch.from_numpy(np.ascontiguousarray(features, dtype=np.float32)))
            return self._raw(self._standardise(rows, mean)).numpy()

    def _embed(self, features: FloatArray, batch: int, *, queries: bool) -> FloatArray:
        def part(rows: Tensor) -> Tensor:
            parts = []
            if self.direct is not None:
                columns = self._direct_columns(rows)
                parts.append(self.direct.queries(columns) if queries else self.direct.items(columns))
            if self.output is not None:
                # The query carries the weight, so that items need not be embedded again where only it changes.
                parts.append(self.query_embedding(rows) * self.blend if queries else self.item_embedding(rows))
            return torch.cat(parts, dim=1)[:, self.kept]

        return self._rows(features, batch, part)

    def _rows(self, features: FloatArray, batch: int, forward: Callable[[Tensor], Tensor]) -> FloatArray:
        if features.ndim != 2 or features.shape[1] != self.config.in_dim:
            raise FeatureMismatch(
                f"the head takes rows of {self.config.in_dim} features, got {features.shape}",
                expected=self.config.in_dim,
                got=features.shape,
            )
        was_training = self.training
        self.eval()
        with torch.no_grad():
            parts = [forward(torch.from_numpy(np.array(features[start : start + batch], dtype=np.float32))).numpy()
                     for start in range(0, max(1, features.shape[0]), batch)]  # fmt: skip
        self.train(was_training)
        return np.concatenate(parts)

    def _direct_columns(self, features: Tensor) -> Tensor:
        return torch.cat([c for b, c in self._blocks_of(features) if b.name == self.config.direct], dim=1)

    def _learned_columns(self, features: Tensor) -> Tensor:
        if not self.config.direct:
            return features
        return torch.cat([c for b, c in self._blocks_of(features) if b.name != self.config.direct], dim=1)

    def _blocks_of(self, features: Tensor) -> list[tuple[FeatureBlock, Tensor]]:
        parts = torch.split(features, [block.dim for block in self.config.blocks], dim=1)
        return list(zip(self.config.blocks, parts, strict=True))

    def _standardise(self, features: Tensor, mean: Tensor) -> Tensor:
        # Features of an image unlike the corpus may lie far out; clamping keeps the network where it was trained.
        return ((features - mean) * self.scale).clamp(-8.0, 8.0)

    def _raw(self, z: Tensor) -> Tensor:
        parts = torch.split(z, [block.dim for block in self.config.learned], dim=1)
        weights = torch.exp(self.block_log_weight)
        weighted = [functional.normalize(part, dim=1, eps=1e-6) * weights[i] for i, part in enumerate(parts)]
        return functional.normalize(torch.cat(weighted, dim=1), dim=1, eps=1e-6)

    def _direction(self, z: Tensor, hidden: Tensor) -> Tensor:
        if self.output is None:
            raise FeatureMismatch("this head has no network: its only block is the direct one")
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


def nested_columns(config: HeadConfig, width: int) -> IntArray:
    """Which columns of a full embedding make one of ``width``: the leading ones of each part.

    The network keeps its columns, up to half of all, and the item prior its one: the first few of a network say
    nearly all it has to say, while a direct part gains with every direction (docs/student.md).
    """
    if width == config.full_dim:
        return np.arange(width)
    network = config.out_dim if config.learned else 0
    prior = config.full_dim - config.direct_dim - network if width > 1 else 0
    share = max(min(network, (width - prior) // 2), width - prior - config.direct_dim)
    kept = np.concatenate([
        np.arange(width - prior - share), config.direct_dim + np.arange(share),
        config.direct_dim + network + np.arange(prior),
    ])  # fmt: skip
    return kept.astype(np.int64)


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
