"""Nearest neighbours by inner product behind one small interface: ``VectorIndex``, built, loaded or chosen here."""

from byline.index.choice import AUTO, IndexChoice, choose_index
from byline.index.factory import build_index, load_index
from byline.index.flat import FlatIndex
from byline.index.protocol import IndexStats, VectorIndex

__all__ = [
    "AUTO", "FlatIndex", "IndexChoice", "IndexStats", "VectorIndex", "build_index", "choose_index", "load_index",
]  # fmt: skip
