"""Releases of a simulated year: built as the trainer builds them, read back, and held to what they say.

Why it exists: "every release is explained by its manifest" is a claim about files, not about variables of a loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from byline.catalog.items import Item
from byline.evaluation.study_data import JUDGE
from byline.ranker.head import Head
from byline.releases.builder import build_release
from byline.releases.manifest import LabelSet, ReleaseManifest, verify_files
from byline.simulation.heads import HeadMaker, Label, labels_digest
from byline.simulation.world import World

MODEL = CORPUS = "simulated"
#: What a manifest's metrics must tell about why the release is there and what became of it.
TOLD = ("triggers", "gate", "fit", "labels", "curation", "corpus")
GOLDEN = 8


@dataclass(frozen=True)
class Shelf:
    """Where one arm's releases lie."""

    root: Path
    world: World
    maker: HeadMaker
    git_sha: str = ""

    def build(self, head: Head, train: Sequence[Label], validation: Sequence[Label], week: int, parent: str | None,
              metrics: Mapping[str, Any]) -> ReleaseManifest:
        """Write a release of the corpus of ``week`` and read its manifest."""
        corpus, present = self.world.corpus, np.flatnonzero(self.world.present(week))
        features = self.maker.labelled(validation, JUDGE, week)
        catalogue: list[Item] = [corpus.catalogue[place] for place in present.tolist()]
        directory = build_release(
            self.root, model_id=MODEL, model_revision=corpus.data.digest, corpus_id=CORPUS, head=head,
            feature_spec="+".join(self.maker.encoders), preprocessing_hash=corpus.data.digest,
            item_ids=features.item_ids, item_features=features.item_features, catalogue=catalogue, calibrator={},
            metrics=metrics, parent=parent,
            labels=LabelSet(queries=len(train) + len(validation),
                            digest=labels_digest(corpus, train, validation)),
            teacher_id=corpus.data.teacher_id, golden_features=features.query_features[:GOLDEN],
            created_at=self.world.settings.day(week), git_sha=self.git_sha, index_factory="Flat",
        )
        return ReleaseManifest.read(directory)

    def unexplained(self, release_id: str, parent: str | None, train: Sequence[Label], validation: Sequence[Label],
                    week: int) -> list[str]:
        """What the release's files fail to say, or say otherwise than it was; empty: it is explained.

        ReleaseCorrupt when a file is not what the manifest says.
        """
        directory = self.root / release_id
        manifest = ReleaseManifest.read(directory)
        verify_files(directory, manifest)
        wrong = [name for name in TOLD if not manifest.metrics.get(name)]
        if not manifest.metrics.get("gate", {}).get("passed") and not manifest.metrics.get("gate", {}).get("reasons"):
            wrong.append("why it was refused")
        if manifest.parent != parent:
            wrong.append("parent")
        if manifest.labels.digest != labels_digest(self.world.corpus, train, validation):
            wrong.append("labels")
        items, day = int(self.world.present(week).sum()), self.world.settings.day(week)
        if (manifest.items, manifest.created_at) != (items, day):
            wrong.append("corpus")
        return wrong
