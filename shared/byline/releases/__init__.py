"""Releases: head, index and catalogue as one immutable directory; registry, loader and the holder that swaps.

``manifest`` and ``registry`` import neither torch nor faiss (the gateway uses them); ``builder`` and ``loader`` do.
"""
