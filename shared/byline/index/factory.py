"""From a factory string to the class that builds or opens it.

Why it exists: a release's manifest names its index by a FAISS factory string; here is the list of those this version
knows. They are FAISS's own, so ``faiss.index_factory`` understands them too.
"""

from __future__ import annotations

import re
from pathlib import Path

from byline.errors import ReleaseCorrupt
from byline.index.accelerated import on_device
from byline.index.flat import FACTORY, FlatIndex
from byline.index.milvus import FACTORY as MILVUS
from byline.index.milvus import MilvusIndex
from byline.index.protocol import Ids, VectorIndex, Vectors
from byline.index.refined import RefinedIndex
from byline.index.tiers import HNSWIndex, IVFIndex, IVFRaBitQIndex, SQ8Index

KNOWN = "Flat; SQ8,RFlat; IVF<lists>,SQ8,RFlat; RR<dim>,IVF<lists>,RaBitQ,RFlat; HNSW<links>,Flat; Milvus:<uri>"
_TIERS: tuple[tuple[re.Pattern[str], type[RefinedIndex]], ...] = (
    (re.compile(r"SQ8,RFlat"), SQ8Index),
    (re.compile(r"IVF(\d+),SQ8,RFlat"), IVFIndex),
    (re.compile(r"(?:RR\d+,)?IVF(\d+),RaBitQ,RFlat"), IVFRaBitQIndex),
    (re.compile(r"HNSW(\d+),Flat"), HNSWIndex),
)


def build_index(ids: Ids, vectors: Vectors, factory: str = FACTORY) -> VectorIndex:
    """An index of the asked kind. ValueError for a factory string that is not known here, and as ``build`` raises."""
    if factory == FACTORY:
        return FlatIndex.build(ids, vectors)
    for pattern, kind in _TIERS:
        match = pattern.fullmatch(factory)
        if match is None:
            continue
        size = int(match[1]) if match.groups() else None
        if kind is HNSWIndex and size is not None:
            return HNSWIndex.build(ids, vectors, size)
        if issubclass(kind, IVFIndex):
            return kind.build(ids, vectors, size)
        return SQ8Index.build(ids, vectors)
    if factory.partition(":")[0] == MILVUS:  # ValueError without a uri
        return MilvusIndex.build(ids, vectors, uri=factory.partition(":")[2])
    raise ValueError(f"unknown index factory {factory!r}; known: {KNOWN}")


def load_index(path: Path, factory: str = FACTORY, mmap: bool = True, device: str = "cpu") -> VectorIndex:
    """Open the index of a release by the factory string of its manifest. ReleaseCorrupt when it does not fit.

    ``device``: a flat index is scanned there (``accelerated``); the other tiers search on the CPU wherever they are.
    """
    if factory == FACTORY:
        return on_device(FlatIndex.load(path, mmap), device)
    if factory == MILVUS:
        return MilvusIndex.load(path)
    for pattern, kind in _TIERS:
        if pattern.fullmatch(factory):
            index: VectorIndex = kind.load(path, mmap)
            if index.factory != factory:
                raise ReleaseCorrupt(f"{path.name} is {index.factory}, not {factory}", file=path.name)
            return index
    raise ReleaseCorrupt(f"unknown index factory {factory!r}; this version knows {KNOWN}", factory=factory)
