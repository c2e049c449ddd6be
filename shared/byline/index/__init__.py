"""Nearest neighbours by inner product behind one small interface: ``VectorIndex``, ``build_index``, ``load_index``."""

from byline.index.flat import FlatIndex, build_index, load_index
from byline.index.protocol import VectorIndex

__all__ = ["FlatIndex", "VectorIndex", "build_index", "load_index"]
