"""The part of a release that serves the ESTIMATED tier: item sketches as an index, and the basis they stand in.

Why it exists: a query's sketch can only be compared with item sketches made in the same basis, so both travel
in one release, are verified together and swapped together. A release without them is whole, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from byline.errors import FeatureMismatch, ReleaseCorrupt
from byline.index import AUTO, IndexChoice, VectorIndex, choose_index, load_index
from byline.index.flat import FACTORY
from byline.releases.golden import GoldenQueries
from byline.releases.manifest import (
    SKETCH_BASIS,
    SKETCH_GOLDEN,
    SKETCH_TOKENS,
    SKETCHES,
    IndexSection,
    IndexTrial,
    ReleaseManifest,
    SketchSection,
)

#: Sketches of items that are asked as golden queries, spread over the corpus.
GOLDEN_SKETCHES = 4


class TokenFile(Protocol):
    """Token gradients as a release keeps them; ``byline.teachers.token_gradients.TokenGradients`` is one."""

    @property
    def item_ids(self) -> NDArray[np.int64]:
        """[n]."""
        ...

    def save(self, path: Path) -> None:
        """Write one file."""
        ...


class BasisFile(Protocol):
    """The basis sketches stand in; ``byline.teachers.sketch_basis.SketchBasis`` is one."""

    def save(self, path: Path) -> None:
        """Write one file."""
        ...


@dataclass(frozen=True)
class SketchParts:
    """What a release with sketches is built from.

    ``item_ids`` int64 [n] are the items of the release, in any order; ``sketches`` [n, d] stand in ``basis``.
    ``tokens``, of the same items, where the set has them.
    """

    item_ids: NDArray[np.int64]
    sketches: NDArray[np.float32]
    basis: BasisFile
    section: SketchSection
    tokens: TokenFile | None = None


@dataclass(frozen=True)
class ReleaseSketches:
    """The sketches of an opened release. ``tokens`` is the file of its token gradients, None without."""

    section: SketchSection
    index: VectorIndex
    basis: Path
    tokens: Path | None = None


def section_of(
    *, teacher_id: str, dimensions: int, selection: str, query_draws: int, fidelity: Mapping[str, object],
    token_rank: int = 0,
) -> SketchSection:  # fmt: skip
    """The manifest's section; of ``fidelity`` only the finite numbers, because JSON has no others."""
    measured = {
        name: float(value)
        for name, value in fidelity.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }
    return SketchSection(
        teacher_id=teacher_id, dimensions=dimensions, selection=selection, query_draws=query_draws,
        token_rank=token_rank, fidelity=measured,
    )


def index_section(choice: IndexChoice) -> IndexSection:
    """What the manifest says of a chosen index."""
    facts = {name: getattr(choice, name) for name in IndexSection.model_fields if name != "tried"}
    return IndexSection(**facts, tried=tuple(IndexTrial(**asdict(trial)) for trial in choice.tried))


def write_sketches(
    directory: Path, parts: SketchParts, item_ids: NDArray[np.int64], factory: str = AUTO
) -> SketchSection:
    """Write index, basis and golden queries into a release that is being built of ``item_ids``; the section with the
    index that was chosen, or that ``factory`` asks for.

    FeatureMismatch when the sketches are of other items or of another width than their section says.
    """
    if not np.array_equal(np.sort(parts.item_ids), np.sort(item_ids)):
        raise FeatureMismatch(f"{len(parts.item_ids)} sketches and {len(item_ids)} items of the release do not match")
    if parts.sketches.shape != (len(parts.item_ids), parts.section.dimensions):
        raise FeatureMismatch(
            f"sketches of shape {parts.sketches.shape} are not {len(parts.item_ids)} x {parts.section.dimensions}"
        )
    if parts.tokens is not None:
        if not np.array_equal(np.sort(parts.tokens.item_ids), np.sort(item_ids)):
            raise FeatureMismatch("the token gradients are of other items than the release")
        parts.tokens.save(directory / SKETCH_TOKENS)
    sketches = np.asarray(parts.sketches, dtype=np.float32)
    choice = choose_index(parts.item_ids, sketches, factory=factory)
    index = choice.index
    index.save(directory / SKETCHES)
    parts.basis.save(directory / SKETCH_BASIS)
    asked = sketches[np.linspace(0, len(sketches) - 1, min(GOLDEN_SKETCHES, len(sketches))).astype(int)]
    # Scaled so that an item scores 1 against itself: the tolerance of golden queries is an absolute one, too.
    asked = asked / np.maximum((asked**2).sum(axis=1, keepdims=True), np.finfo(np.float32).tiny)
    GoldenQueries.record(asked, index.search, index.ntotal).save(directory / SKETCH_GOLDEN)
    return parts.section.model_copy(update={"index": index_section(choice)})


def open_sketches(
    directory: Path, manifest: ReleaseManifest, mmap: bool = True, device: str = "cpu"
) -> ReleaseSketches | None:
    """The sketches of a release whose files were verified; None if it has none.

    ReleaseCorrupt when width or number of rows is not what the manifest says, or the golden queries come out
    differently. That the ids are the catalogue's is for the loader to check, which has both.
    """
    section = manifest.sketches
    if section is None:
        return None
    index = load_index(directory / SKETCHES, section.index.factory if section.index else "Flat", mmap, device)
    facts = {
        "sketch index width": (index.dim, section.dimensions),
        "sketch index rows": (index.ntotal, manifest.items),
    }
    for name, (found, stated) in facts.items():
        if found != stated:
            raise ReleaseCorrupt(
                f"{name} of release {manifest.release_id} is {found}, the manifest says {stated}",
                release_id=manifest.release_id,
            )
    golden = GoldenQueries.load(directory / SKETCH_GOLDEN)
    if golden.features.shape[1] != index.dim:
        raise ReleaseCorrupt(f"{SKETCH_GOLDEN} holds queries of another width", file=SKETCH_GOLDEN)
    golden.check(index.search, exact=index.factory == FACTORY)
    tokens = directory / SKETCH_TOKENS if section.token_rank else None
    return ReleaseSketches(section, index, directory / SKETCH_BASIS, tokens)
