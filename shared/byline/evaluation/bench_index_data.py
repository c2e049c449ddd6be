"""Vectors to search in: real embeddings of real images and their augmented views, and the corpus's own sketches.

Why it exists: an index looks better on random or clustered toy data than on what encoders give, and a corpus of 2,509
items says nothing about 100,000. What is real here and what is grown, precisely:

``cosine``: row r is view ``r // images`` of image ``r % images``, where the images are the corpus's own items followed
by Fashion-MNIST's 70,000 (if its folder is given). View 0 is the image itself, later ones are drawn with a seed:
mirrored or not, turned by up to 20 degrees, cropped to 70-100 %, moved, brighter or darker. Every row went through
EfficientNet-Lite0 (at 64 px instead of 224: 12 times less work), is reduced by PCA to ``dim`` and has unit norm.
Queries are further views of images in the index, so no query is a row. Rows beyond the ``real`` first ones, which a
million needs, are grown from those: x_a + 0.3 (x_b - x_c) of three random ones, of unit norm again. They keep the
directions of the variance, not its finer grain: a size that has them says so.

``product``: the cosine rows, each times a number of its own, drawn from the norms of the corpus's own 2,509 item
sketches with 10 % of jitter: half of them are below 5.3, one in a hundred is above 63. Such are the item vectors of a
student that predicts influence: inner product, and a few items that matter to everyone. Direction and norm are
independent here, which real vectors need not be. Queries as for ``cosine``.

``sketch``: the corpus's own 2,509 item sketches come first; the rows beyond them are grown in the same way, without
the norm, and so are the queries. Inner product.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.nn import functional as F

from byline.features.efficientnet import EfficientNetLite0
from byline.teachers.sketch_set import SketchSet

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]
Progress = Callable[[int, int], None]

SIDE = 64
SHARD = 4096
#: Views of this number and above are queries; rows never get there.
_QUERY_VIEW = 1_000_000
#: Share of the difference of two random rows in a grown one.
_SPREAD = 0.3
_MEAN = torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1)
_STD = torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1)


@dataclass(frozen=True)
class Rows:
    """``vectors`` [n, d] to index, ``queries`` [q, d], the name of the set and what it is made of, in words."""

    name: str
    vectors: Floats
    queries: Floats
    what: str


def read_images(corpus: Path, fashion: Path | None) -> list[Pixels]:
    """The corpus's images [n, 64, 64, 3], then Fashion-MNIST's [70000, 28, 28, 3] if its folder is given.

    ``fashion`` holds the four gzipped IDX files, as Debian's package dataset-fashion-mnist installs them.
    """
    encoded = pq.read_table(corpus, columns=["image"]).column("image").to_pylist()
    blocks = [np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in encoded])]
    for part in ("train", "t10k") if fashion is not None else ():
        raw = gzip.decompress((Path(str(fashion)) / f"{part}-images-idx3-ubyte.gz").read_bytes())
        grey = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 28, 28)
        blocks.append(np.repeat(grey[..., None], 3, axis=3))
    return blocks


class Views:
    """Row r → the pixels of a view of an image. Any row can be made alone: the seed is that of the row's shard."""

    def __init__(self, blocks: list[Pixels], seed: int) -> None:
        self._blocks = blocks
        self._ends = np.cumsum([len(block) for block in blocks])
        self._seed = seed

    @property
    def images(self) -> int:
        """Distinct images."""
        return int(self._ends[-1])

    def pixels(self, rows: npt.NDArray[np.int64], shard: int) -> torch.Tensor:
        """[n, 3, SIDE, SIDE] in 0..1. ``shard`` names the random stream; the same call gives the same pixels."""
        numbers, views = rows % self.images, rows // self.images
        out = torch.empty(len(rows), 3, SIDE, SIDE)
        owner = np.searchsorted(self._ends, numbers, side="right")
        for n, block in enumerate(self._blocks):
            mine = np.flatnonzero(owner == n)
            if len(mine):
                start = int(self._ends[n]) - len(block)
                raw = torch.from_numpy(block[numbers[mine] - start]).permute(0, 3, 1, 2).float() / 255
                out[torch.from_numpy(mine)] = F.interpolate(raw, (SIDE, SIDE), mode="bilinear", align_corners=False)
        turned = torch.from_numpy(np.flatnonzero(views > 0))
        if len(turned):
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + shard)
            draws = torch.rand(len(rows), 6, generator=generator)[turned]  # every row its own, whatever its view
            out[turned] = _augmented(out[turned], draws)
        return out


def _augmented(pixels: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Mirror, turn, crop, move and light [n, 3, s, s] as ``draws`` [n, 6] in 0..1 say."""
    angle = (draws[:, 0] - 0.5) * 2 * np.pi / 9
    scale = 0.7 + 0.3 * draws[:, 1]
    mirror = torch.where(draws[:, 2] < 0.5, -1.0, 1.0)
    shift = (draws[:, 3:5] - 0.5) * 2 * (1 - scale)[:, None]
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack(
        [torch.stack([cosine * mirror, -sine, shift[:, 0]], 1), torch.stack([sine * mirror, cosine, shift[:, 1]], 1)], 1
    )  # [n, 2, 3]
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    return (moved * (0.8 + 0.4 * draws[:, 5])[:, None, None, None]).clamp(0, 1)


class ImageFeatures:
    """EfficientNet-Lite0 features [n, 1280] of views, kept in shards on disk; a killed run goes on where it was."""

    def __init__(self, views: Views, folder: Path, device: str = "cpu") -> None:
        self._views = views
        self._folder = folder
        self._device = device
        self._network: Any = None
        folder.mkdir(parents=True, exist_ok=True)

    def rows(self, count: int, progress: Progress = lambda done, total: None) -> npt.NDArray[np.float16]:
        """Features of the first ``count`` rows, float16 as they are kept."""
        shards = range(-(-count // SHARD))
        found = []
        for shard in shards:
            found.append(self._shard(shard, np.arange(shard * SHARD, (shard + 1) * SHARD, dtype=np.int64)))
            progress(shard + 1, len(shards))
        return np.concatenate(found)[:count]

    def queries(self, images: npt.NDArray[np.int64]) -> npt.NDArray[np.float16]:
        """Features of a further view of each of ``images``, which is no row."""
        return self._encode(images + self._views.images * _QUERY_VIEW, shard=_QUERY_VIEW)

    def _shard(self, shard: int, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float16]:
        path = self._folder / f"{shard:05d}.npy"
        if not path.exists():
            partial = path.with_suffix(".partial.npy")
            np.save(partial, self._encode(rows, shard))
            partial.replace(path)
        kept: npt.NDArray[np.float16] = np.load(path, allow_pickle=False)
        return kept

    @torch.inference_mode()
    def _encode(self, rows: npt.NDArray[np.int64], shard: int) -> npt.NDArray[np.float16]:
        if self._network is None:
            self._network = EfficientNetLite0.load(self._device)._network  # at its own 224 px it would take 12x
        pixels = ((self._views.pixels(rows, shard) - _MEAN) / _STD).to(self._device)
        batches = (b.contiguous(memory_format=torch.channels_last) for b in pixels.split(64))
        pooled = [self._network.extract_features(batch).mean(dim=(2, 3)).cpu() for batch in batches]
        return np.asarray(torch.cat(pooled).numpy(), dtype=np.float16)


def cosine_rows(features: ImageFeatures, images: int, count: int, queries: int, dim: int, seed: int, real: int,
                progress: Progress = lambda done, total: None) -> Rows:
    """``count`` unit vectors [count, dim] and ``queries`` more; see the module for what they are."""
    kept = features.rows(min(count, real), progress)
    fitted = torch.from_numpy(kept[:20_000].astype(np.float32))
    mean = fitted.mean(0)
    covariance = (fitted - mean).T @ (fitted - mean)  # [1280, 1280]
    basis = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, : min(dim, kept.shape[1])]
    asked = features.queries(np.random.default_rng(seed).integers(0, min(images, count), queries))
    rows = _projected(kept, mean, basis)
    more = max(0, count - real)
    return Rows(
        "cosine", grown(rows, more, seed, unit=True), _projected(asked, mean, basis),
        f"EfficientNet-Lite0 at {SIDE} px of {min(images, len(kept))} images in up to {-(-len(kept) // images)} views, "
        f"{len(kept)} rows, and {more} grown from them; PCA to {basis.shape[1]}, unit norm; queries: other views",
    )  # fmt: skip


def sketch_rows(directory: Path, model_revision: str, count: int, queries: int, seed: int) -> Rows:
    """``count`` sketches and ``queries`` more; the corpus's own first, grown ones after them (see the module)."""
    own = SketchSet.load(directory, model_revision).sketches.astype(np.float32)
    more = max(0, count - len(own))
    return Rows(
        "sketch", grown(own[:count], more, seed, unit=False), grown(own, queries, seed + 1, unit=False)[len(own) :],
        f"{min(count, len(own))} sketches of the corpus and {more} grown from them; the queries are grown as well",
    )  # fmt: skip


def product_rows(cosine: Rows, norms: Floats, seed: int) -> Rows:
    """``cosine`` with norms drawn from ``norms`` [m]; see the module."""
    rng = np.random.default_rng(seed)
    count = len(cosine.vectors)
    drawn = norms[rng.integers(0, len(norms), count)] * np.exp(0.1 * rng.standard_normal(count))
    return Rows(
        "product", cosine.vectors * drawn.astype(np.float32)[:, None], cosine.queries,
        f"{cosine.what}; then every row times a norm drawn from those of {len(norms)} item sketches",
    )  # fmt: skip


def grown(rows: Floats, more: int, seed: int, unit: bool) -> Floats:
    """``rows`` [n, d] and ``more`` after them: x_a + ``_SPREAD`` (x_b - x_c), with ``unit`` of norm 1."""
    rng = np.random.default_rng(seed)
    out = np.empty((len(rows) + more, rows.shape[1]), dtype=np.float32)
    out[: len(rows)] = rows
    for start in range(len(rows), len(out), 65_536):
        block = out[start : start + 65_536]
        a, b, c = rng.integers(0, len(rows), (3, len(block)))
        block[:] = rows[a] + np.float32(_SPREAD) * (rows[b] - rows[c])
        if unit:
            block /= np.linalg.norm(block, axis=1, keepdims=True)
    return out


def _projected(features: npt.NDArray[np.float16], mean: torch.Tensor, basis: torch.Tensor) -> Floats:
    """Centred, rotated and of unit norm, in blocks: a million rows of 1280 are 5 GB in float32."""
    out = np.empty((len(features), basis.shape[1]), dtype=np.float32)
    for start in range(0, len(features), 65_536):
        block = torch.from_numpy(features[start : start + 65_536].astype(np.float32)) - mean
        out[start : start + len(block)] = F.normalize(block @ basis, dim=1).numpy()
    return out
