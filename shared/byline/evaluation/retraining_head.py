"""A head taught by a study's own teacher, scored on the study's queries: the last step of the method, judged too.

Why it exists: users are answered by the head, not by the teacher it learnt from, so it has to stand before the same
retrainings. Its training queries are further samples of the study's model, of other seeds than the judged ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np

from byline.evaluation.retraining_scores import DoubleArray, Form, ScoreBook
from byline.features import load_extractor
from byline.features.spec import FeatureSpec
from byline.ranker.fit import FitConfig, fit_head
from byline.ranker.head import HeadConfig, feature_blocks
from byline.ranker.labelled_set import LabelledSet
from byline.teachers.ranking import TeacherQuery


@dataclass(frozen=True)
class HeadSettings:
    """``queries`` samples are labelled, a fifth of them to stop by; ``features`` as a spec."""

    queries: int = 120
    features: str = "efficientnet_lite0+minilm+denoiser"
    hidden: tuple[int, ...] = (768, 768, 768)
    out_dim: int = 768
    max_steps: int = 160
    seed: int = 0


def score_head(book: ScoreBook, teacher: str, settings: HeadSettings) -> DoubleArray:
    """Scores [q, n] of a head that learnt the first-order variant ``teacher``, on the study's queries."""
    study = book.study
    rng = np.random.default_rng([settings.seed, 11])
    captions = [study.items[i].caption for i in rng.choice(len(study.items), settings.queries)]
    seeds = [8_000_000 + settings.seed * 10_000 + n for n in range(settings.queries)]
    samples = [TeacherQuery(picture, prompt) for picture, prompt in
               zip(study.sample(book.model, captions, seeds), captions, strict=True)]  # fmt: skip
    form = cast(Form, teacher.rpartition(" ")[2])
    tau = book.first_order_scores(samples, form, only=teacher)[teacher].astype(np.float32)
    extractor = load_extractor(settings.features, device=study.device, model=book.model)
    items = extractor.extract([i.image for i in study.items], [i.caption for i in study.items])
    taught = extractor.extract([s.image for s in samples], captions)
    asked = extractor.extract([q.image for q in study.queries], [q.prompt for q in study.queries])
    held = max(1, settings.queries // 5)
    train = LabelledSet(taught[held:], study.item_ids, items, tau[held:])
    validation = LabelledSet(taught[:held], study.item_ids, items, tau[:held])
    blocks = feature_blocks(FeatureSpec.parse(settings.features).encoders, extractor.dims)
    config = HeadConfig(extractor.dim, blocks, settings.hidden, settings.out_dim)
    # mAP(L) with L a tenth of the corpus, at least the few that the smallest leave-k-out asks for.
    fit = FitConfig(max_steps=settings.max_steps, evaluate_at=max(5, len(study.items) // 10))
    report = fit_head(train, validation, config, fit, settings.seed)
    scores: DoubleArray = report.head.scores(asked, items).astype(np.float64)
    return scores
