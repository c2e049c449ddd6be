"""The demo corpus as a teacher reads it, straight from its parquet file.

Why it exists: the evaluation commands and the benchmark judge teachers without a running service, so they need item
ids, captions and pictures from the file that ships with the repository, not from a database.
"""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from byline.errors import LabelsNotUsable
from byline.teachers.ranking import TeacherItem

_COLUMNS = ["item_id", "caption", "image"]


def read_corpus(parquet: Path) -> list[TeacherItem]:
    """All items in file order, pictures decoded to RGB.

    LabelsNotUsable when the file is missing or has no columns ``item_id``, ``caption`` and ``image``.
    """
    try:
        rows = pq.read_table(parquet, columns=_COLUMNS).to_pylist()
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise LabelsNotUsable(f"{parquet} is no corpus file with columns {', '.join(_COLUMNS)}: {error}") from error
    return [TeacherItem(r["item_id"], Image.open(io.BytesIO(r["image"])).convert("RGB"), r["caption"]) for r in rows]


def near_duplicate_groups(parquet: Path) -> dict[int, int]:
    """Near-duplicate group of every item id; a group is named by its smallest item id."""
    table = pq.read_table(parquet, columns=["item_id", "near_duplicate_group"])
    return dict(zip(table["item_id"].to_pylist(), table["near_duplicate_group"].to_pylist(), strict=True))
