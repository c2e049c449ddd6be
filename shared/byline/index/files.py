"""FAISS files with ids: written by one function, read by one function, mapped instead of read where asked.

Why it exists: FAISS parses native structures, so its limits must be set and every failure must come out as
ReleaseCorrupt. Only open files whose digest was checked (``releases.loader`` does).
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from byline.errors import ReleaseCorrupt
from byline.index.protocol import Ids

_DESERIALISATION = threading.Lock()


def with_ids(index: Any) -> Any:
    """An empty index under an ``IndexIDMap``: no reverse map, which would cost 40 bytes an item and is not needed."""
    return faiss.IndexIDMap(index)


def write_file(index: Any, path: Path) -> None:
    """Write an index to one file."""
    faiss.write_index(index, str(path))


def read_file(path: Path, mmap: bool) -> tuple[Any, Any, Ids]:
    """The index with ids, the one inside it, and the ids [n]. Hold the first: it owns the second.

    With ``mmap`` codes, lists and vectors stay in the file. ReleaseCorrupt when it is missing, broken or without ids.
    """
    flags = faiss.IO_FLAG_MMAP_IFC if mmap else 0
    try:
        with _DESERIALISATION:  # the limit is global to the process
            faiss.set_deserialization_vector_byte_limit(max(path.stat().st_size, 1))
            index = faiss.read_index(str(path), flags)
    except (RuntimeError, OSError) as error:
        raise ReleaseCorrupt(f"{path.name} cannot be read as an index", file=path.name) from error
    if not isinstance(index, faiss.IndexIDMap):
        raise ReleaseCorrupt(f"{path.name} is a {type(index).__name__}, not an index with ids", file=path.name)
    ids: Ids = faiss.vector_to_array(index.id_map).astype(np.int64)
    return index, faiss.downcast_index(index.index), ids
