"""Open a release: verify everything, then answer from it.

Why it exists: nothing of a release is used before its files match the manifest, its parts match each other
and its golden queries come out as recorded. The result is immutable and shared by any number of readers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from byline.errors import FeatureMismatch, ReleaseCorrupt
from byline.index import VectorIndex, load_index
from byline.index.delta import merge_best
from byline.index.flat import FACTORY
from byline.index.protocol import NO_ITEM
from byline.ranker.head import Head, load_head
from byline.releases.catalogue import Catalogue, read_catalogue
from byline.releases.golden import GoldenQueries
from byline.releases.labelled import LABELLED, LabelledPlaces
from byline.releases.manifest import CALIBRATOR, CATALOGUE, EMBEDDINGS, GOLDEN, HEAD, ReleaseManifest
from byline.releases.sketches import ReleaseSketches, open_sketches
from byline.releases.vouched import vouched
from byline.security.signing import NOT_SIGNED, Keyring


@dataclass(frozen=True, slots=True)
class Hit:
    """One found item: ``score`` is the inner product (higher = more influential), ``rank`` starts at 1."""

    item_id: int
    score: float
    rank: int


@dataclass(frozen=True)
class Release:
    """An opened release. All of one answer comes from one of these."""

    manifest: ReleaseManifest
    directory: Path
    head: Head
    index: VectorIndex
    catalogue: Catalogue
    calibrator: Mapping[str, Any]
    #: None where the release does not serve the ESTIMATED tier.
    sketches: ReleaseSketches | None = None
    #: None in releases from before it was kept, or of too few labels: then nothing is said of a query's distance.
    labelled: LabelledPlaces | None = None

    @property
    def release_id(self) -> str:
        """The release's name."""
        return self.manifest.release_id

    def embed(self, query_features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Query embeddings [q, d] of features [q, d_in]. FeatureMismatch for another width."""
        features = np.asarray(query_features, dtype=np.float32)
        if features.ndim != 2 or features.shape[1] != self.manifest.feature_dim:
            raise FeatureMismatch(
                f"features of shape {features.shape} do not fit {self.manifest.feature_spec} "
                f"({self.manifest.feature_dim} numbers)",
                release_id=self.release_id,
            )
        return self.head.embed_queries(features)

    def search(
        self, query_features: NDArray[np.float32], k: int, exclude: NDArray[np.int64] | Sequence[int] | None = None
    ) -> list[Hit]:
        """The k most influential items by features [d_in] of one query; ``exclude`` holds withdrawn ids."""
        return self.search_embedding(self.embed(np.asarray(query_features)[None, :])[0], k, exclude)

    def search_embedding(
        self, embedding: NDArray[np.float32], k: int, exclude: NDArray[np.int64] | Sequence[int] | None = None,
        added: VectorIndex | None = None,
    ) -> list[Hit]:  # fmt: skip
        """The k most influential items by a ready embedding [d]; fewer when fewer remain. ``added`` are the items that
        came after the release was built, embedded by its head."""
        left_out = None if exclude is None else np.asarray(exclude, dtype=np.int64)
        asked = np.asarray(embedding, dtype=np.float32)[None, :]
        scores, ids = self.index.search(asked, k, left_out)
        if added is not None:
            scores, ids = merge_best((scores, ids), added.search(asked, k, left_out), k)
        found = zip(ids[0].tolist(), scores[0].tolist(), strict=True)
        return [Hit(i, score, rank) for rank, (i, score) in enumerate(found, start=1) if i != NO_ITEM]


def load_release(
    directory: Path, mmap: bool = True, expected: ReleaseManifest | None = None, device: str = "cpu",
    keyring: Keyring = NOT_SIGNED,
) -> Release:  # fmt: skip
    """Open and verify a release directory; asking the golden queries also warms it.

    ``expected`` is the registry's copy of the manifest: FAISS parses native structures, so a service opens
    only what the registry vouches for and, with a ``keyring``, what one of its keys signed (SignatureInvalid).
    ``device`` is where exact indexes are scanned. ReleaseCorrupt says what is
    missing, altered or does not fit.
    """
    directory = Path(directory)
    manifest = vouched(directory, keyring, expected)
    release = Release(
        manifest=manifest,
        directory=directory,
        head=load_head(directory / HEAD),
        index=load_index(directory / EMBEDDINGS, manifest.index_factory, mmap, device),
        catalogue=read_catalogue(directory / CATALOGUE),
        calibrator=_read_calibrator(directory / CALIBRATOR),
        sketches=open_sketches(directory, manifest, mmap, device),
        labelled=(
            LabelledPlaces.load(directory / LABELLED, manifest.feature_dim) if LABELLED in manifest.files else None
        ),
    )
    _check_fit(release)
    GoldenQueries.load(directory / GOLDEN).check(
        lambda features, k: release.index.search(release.embed(features), k), exact=release.index.factory == FACTORY
    )
    return release


def _check_fit(release: Release) -> None:
    """The parts agree with the manifest and with each other. ReleaseCorrupt names the first disagreement."""
    manifest, index = release.manifest, release.index
    facts = {
        "head input width": (release.head.config.in_dim, manifest.feature_dim),
        "head output width": (release.head.config.embedding_dim, manifest.embedding_dim),
        "index width": (index.dim, manifest.embedding_dim),
        "index rows": (index.ntotal, manifest.items),
        "catalogue rows": (len(release.catalogue), manifest.items),
    }
    for name, (found, stated) in facts.items():
        if found != stated:
            raise ReleaseCorrupt(
                f"{name} of release {manifest.release_id} is {found}, the manifest says {stated}",
                release_id=manifest.release_id,
            )
    catalogue = release.catalogue.ids
    indexes = {"index": index} | ({"sketch index": release.sketches.index} if release.sketches else {})
    for name, held in indexes.items():
        if not np.array_equal(held.ids, catalogue):
            raise ReleaseCorrupt(
                f"{name} and catalogue of release {manifest.release_id} name different items",
                release_id=manifest.release_id,
            )


def _read_calibrator(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ReleaseCorrupt(f"{path.name} is not JSON", file=path.name) from error
    if not isinstance(value, dict):
        raise ReleaseCorrupt(f"{path.name} is not an object", file=path.name)
    return value
