"""A head taught by a study's own teacher, scored on the study's queries: the last step of the method, judged too.

Why it exists: users are answered by the head, not by the teacher it learnt from, so it has to stand before the same
retrainings. Its training queries are further samples of the study's model, of other seeds than the judged ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from byline.errors import TeacherNotUsable
from byline.evaluation.retraining_scores import DoubleArray, Form, ScoreBook
from byline.features import FeatureExtractor, load_encoder
from byline.features.gradient import Gradient, fit_gradient_feature
from byline.features.registry import GRADIENT
from byline.features.spec import FeatureSpec
from byline.ranker.fit import FitConfig, fit_head
from byline.ranker.head import HeadConfig
from byline.ranker.labelled_set import LabelledSet
from byline.teachers.first_order import AbuPlusLinear
from byline.teachers.gradient_basis import GradientBasis
from byline.teachers.item_gradients import Objective
from byline.teachers.ranking import TeacherQuery
from byline.teachers.sketch_fit import fit_sketches


@dataclass(frozen=True)
class HeadSettings:
    """``queries`` samples are labelled, a fifth of them to stop by; ``features`` as a spec."""

    queries: int = 120
    features: str = "minilm+gradient"
    hidden: tuple[int, ...] = (512, 512)
    out_dim: int = 512
    max_steps: int = 160
    #: Draws of the item gradients that the directions of the feature ``gradient`` are fitted on.
    basis_draws: int = 16
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
    extractor = _extractor(book, form, settings)
    items = extractor.extract([i.image for i in study.items], [i.caption for i in study.items])
    taught = extractor.extract([s.image for s in samples], captions)
    asked = extractor.extract([q.image for q in study.queries], [q.prompt for q in study.queries])
    held = max(1, settings.queries // 5)
    train = LabelledSet(taught[held:], study.item_ids, items, tau[held:])
    validation = LabelledSet(taught[:held], study.item_ids, items, tau[:held])
    config = HeadConfig.of_encoders(extractor.spec.encoders, extractor.dims, settings.hidden, settings.out_dim)
    # mAP(L) with L a tenth of the corpus, at least the few that the smallest leave-k-out asks for.
    fit = FitConfig(max_steps=settings.max_steps, evaluate_at=max(5, len(study.items) // 10))
    report = fit_head(train, validation, config, fit, settings.seed)
    scores: DoubleArray = report.head.scores(asked, items).astype(np.float64)
    return scores


def _extractor(book: ScoreBook, form: Form, settings: HeadSettings) -> FeatureExtractor:
    """The encoders; ``gradient`` with a basis of the study's model, for the objective of ``form``."""
    spec, study = FeatureSpec.parse(settings.features), book.study
    encoders = [load_encoder(name, device=study.device, model=book.model) if name != GRADIENT
                else _gradient(book, form, settings) for name in spec.encoders]  # fmt: skip
    return FeatureExtractor(spec, encoders)


def _gradient(book: ScoreBook, form: Form, settings: HeadSettings) -> Gradient:
    objective: Objective = "output_norm" if form == "output_norm" else "denoising"
    wanted = replace(
        book.settings.unlearning(book.count), item_draws=settings.basis_draws, replicates=1, objective=objective
    )
    teacher = AbuPlusLinear(book.model, book.curvature("cross_attention_kv"), wanted)
    # Its folder is the cache of a fit that a kill interrupts; the sketches themselves are not wanted.
    name = f"{GRADIENT}-{objective}-{settings.basis_draws}"
    folder = book.files.find(name, book.model.revision)
    if folder is None:
        tokens = fit_sketches(teacher, book.study.items, dimensions=1, store=book.files.scratch(name)).tokens
        if tokens is None:
            raise TeacherNotUsable("the study's model has no token gradients, which the feature gradient is made from")
        with book.files.publishing(name, book.model.revision) as folder:
            fit_gradient_feature(teacher, tokens, (), None, folder, seed=settings.seed)
        book.files.clear_scratch(name)
        folder = book.files.target(name)
    basis = GradientBasis.load(folder, book.model.revision)
    return Gradient(book.model, book.curvature(basis.selection), basis)
