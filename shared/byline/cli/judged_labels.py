"""The labels a head is judged by, from the database or from files, in the same form.

Why it exists: ``byline evaluate head`` must say the same of a head whether the services run or only a checkout is at
hand; so where labels come from is decided here and nothing behind it knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sqlalchemy import Engine

from byline.catalog.blobs import BlobStore
from byline.catalog.store import CatalogStore
from byline.config import Settings
from byline.errors import LabelsNotUsable
from byline.ranker.labelled_set import LabelledSet
from byline.rankings.labelled import JUDGE, LEARN, halves_are_disjoint, judging_queries, labelled_set, load_splits
from byline.rankings.store import RankingStore

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class JudgedLabels:
    """Held-out queries on the noise that judges, and what stands beside them.

    ``train`` and ``validation`` are what baselines and a head fitted here learn from; ``other_half`` [q, n] is τ of the
    held-out queries from the other noise (None: the teacher kept no halves); ``creators`` [n] by item.
    """

    held_out: LabelledSet
    train: LabelledSet
    validation: LabelledSet | None
    other_half: FloatArray | None
    blocks: tuple[tuple[str, int], ...]
    feature_spec: str
    preprocessing_hash: str
    train_prompts: tuple[str, ...]
    creators: tuple[str, ...]


def from_files(settings: Settings, labels: Path, feature_spec: str, split: str, cutoff: int) -> JudgedLabels:
    """From a label snapshot and the configured corpus and model; needs no server."""
    # Heavy imports here and below: `byline evaluate head --help` must not wait for torch.
    from byline.rankings.label_files import read_label_files

    found = read_label_files(labels, settings.corpus_source, settings.model_directory, feature_spec,
                             settings.cache_dir, settings.device)
    return JudgedLabels(
        found.labelled(split, JUDGE, cutoff), found.labelled("train"),
        found.labelled("validation", cutoff=cutoff) if found.of("validation") else None,
        found.labelled(split, LEARN, cutoff).tau if found.disjoint(split) else None, found.blocks, found.feature_spec,
        found.preprocessing_hash, tuple(query.prompt for query in found.of("train")), found.creators,
    )  # fmt: skip


def from_database(engine: Engine, settings: Settings, model_id: str, teacher: str, feature_spec: str, split: str,
                  cutoff: int) -> JudgedLabels:
    """From the rankings of ``model_id`` by ``teacher`` (an id or a family). LabelsNotUsable when the split has none."""
    from byline.diffusion.model import DiffusionModel
    from byline.features import load_extractor
    from byline.features.registry import needs_model
    from byline.rankings.features import LabelFeatures

    catalog = CatalogStore(engine)
    model = catalog.model(model_id)
    splits = load_splits(RankingStore(engine), model_id, teacher)
    rankings = {"test": splits.test, "validation": splits.validation}.get(split, ())
    if not rankings or not splits.train:
        raise LabelsNotUsable(f"there are {len(rankings)} rankings of split {split!r} by {teacher} and "
                              f"{len(splits.train)} to train on; import labels, or choose another --split")
    diffusion = DiffusionModel.load(model.directory, settings.device) if needs_model(feature_spec) else None
    extractor = load_extractor(feature_spec, device=settings.device, model=diffusion, cache=settings.cache_dir)
    features = LabelFeatures(extractor, BlobStore(settings.blob_dir), settings.cache_dir, model.corpus_id)
    items = catalog.items(model.corpus_id)
    ids = np.asarray([item.item_id for item in items], dtype=np.int64)
    item_rows = features.of_items(items, _no_progress)
    held = judging_queries(rankings, cutoff)
    held_rows = features.of_queries(held, _no_progress)
    disjoint = halves_are_disjoint(held, teacher)
    stopping = judging_queries(splits.validation, cutoff)
    stopping_rows = features.of_queries(stopping, _no_progress)
    validation = labelled_set(stopping, stopping_rows, ids, item_rows, JUDGE) if stopping else None
    return JudgedLabels(
        labelled_set(held, held_rows, ids, item_rows, JUDGE),
        labelled_set(splits.train, features.of_queries(splits.train, _no_progress), ids, item_rows, LEARN),
        validation,
        labelled_set(held, held_rows, ids, item_rows, LEARN).tau if disjoint else None, tuple(features.blocks),
        features.spec, features.preprocessing_hash, tuple(ranking.prompt for ranking in splits.train),
        tuple(item.creator for item in items),
    )  # fmt: skip


def _no_progress(done: int, total: int) -> None:
    """Features come from the trainer's cache as a rule; nothing to show."""
