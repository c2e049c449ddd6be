"""One refresh: labels in, a judged release out.

Why it exists: service loop, demo and tests run exactly this. Nothing is decided here that could be decided by a pure
function (``schedule``, ``gate``, the fit, the report); this module only brings their inputs together and records the
outcome. A candidate that fails the gate is built and registered too, as REJECTED: one must be able to look at it.
Everything is read once, at the beginning: labels that come while a head is fitted are the next refresh's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from sqlalchemy import Engine, func, select

from byline.catalog.items import Item
from byline.catalog.store import CatalogStore
from byline.db.session import transaction
from byline.errors import BylineError, LabelsNotUsable, ReleaseChanged
from byline.evaluation.calibrate import Calibration
from byline.evaluation.head_report import HeadReport, report_head
from byline.evaluation.map import MapResult, mean_average_precision
from byline.failpoints import failpoint
from byline.index import AUTO
from byline.ranker.fit import FitReport
from byline.ranker.head import Head, HeadConfig, load_head
from byline.ranker.labelled_set import LabelledSet
from byline.rankings.calibration_rows import CalibrationRows, EvidenceRows, HeldOut, calibrate
from byline.rankings.features import Asked
from byline.rankings.labelled import JUDGE, LEARN, LabelSplits, judging_queries, labelled_set, load_splits
from byline.rankings.store import LabelledQuery, RankingStore
from byline.releases.builder import build_release
from byline.releases.labelled import LabelledPlaces
from byline.releases.manifest import HEAD, LabelSet, RefreshSection, RefreshTrigger, ReleaseManifest
from byline.releases.registry import ActiveRelease, ReleaseRecord, ReleaseRegistry
from byline.releases.sketches import SketchParts
from byline.security.signing import NOT_SIGNED, Keyring
from byline.telemetry import get_logger
from services.trainer.candidates import Candidate, FitPlan, Previous, Start, best_of, fit_candidates
from services.trainer.gate import GateDecision, GateEvidence, GateLimits, judge, score_agreement
from services.trainer.schedule import Due, Trigger, needs_fit

log = get_logger(__name__)

FloatArray = npt.NDArray[np.float32]
#: Called with (what is being done, done, total).
Progress = Callable[[str, int, int], None]

#: With at least this many ranked test queries the gate judges on them; otherwise on the validation queries.
MINIMUM_TEST_QUERIES = 10
#: Queries kept in the release to check after loading that it still gives the same answers.
GOLDEN_QUERIES = 8


class FeatureRows(Protocol):
    """Features of items and queries, in one FeatureSpec; ``byline.rankings.features.LabelFeatures`` is one."""

    @property
    def spec(self) -> str:
        """Name of the FeatureSpec."""
        ...

    @property
    def preprocessing_hash(self) -> str:
        """Hash of what is done to an image or text before encoding."""
        ...

    @property
    def blocks(self) -> Sequence[tuple[str, int]]:
        """(encoder, width) in the order of the columns."""
        ...

    def of_items(self, items: Sequence[Item], progress: Callable[[int, int], None]) -> FloatArray:
        """[n, in] in the order of ``items``."""
        ...

    def of_queries(self, rankings: Sequence[Asked], progress: Callable[[int, int], None]) -> FloatArray:
        """[q, in] in the order of ``rankings``."""
        ...


class SketchRows(Protocol):
    """Sketches of items, for the ESTIMATED tier; ``services.trainer.sketches.CorpusSketches`` is one."""

    def of_items(self, items: Sequence[Item], progress: Callable[[int, int], None]) -> SketchParts | None:
        """Of exactly these items; None if the model has no sketches."""
        ...


@dataclass(frozen=True)
class RefreshSettings:
    """What a refresh does. ``epochs`` counts passes over the training queries; ``cutoff`` is the L of mAP(L)."""

    model_id: str
    teacher_family: str
    cutoff: int
    limits: GateLimits
    loss: str = "listwise"
    #: Labels count as far as their standard errors let them be trusted.
    weighted: bool = False
    epochs: int = 40
    hidden: tuple[int, ...] = (512, 512)
    out_dim: int = 512
    width: int = 768
    git_sha: str = ""
    #: Of the release's index; ``auto`` chooses by size and measured recall.
    index_factory: str = AUTO
    #: Signs the manifest, if it has a key.
    keyring: Keyring = NOT_SIGNED


@dataclass(frozen=True)
class RefreshOutcome:
    """What became of the candidate. ``activated`` is False if the gate refused it or another activation came first."""

    release_id: str
    activated: bool
    decision: GateDecision
    report: HeadReport
    start: Start
    due: tuple[Due, ...] = ()


@dataclass(frozen=True)
class _Labels:
    splits: LabelSplits
    train: LabelledSet
    validation: LabelledSet
    held_out: LabelledSet
    #: The rankings behind ``validation`` and ``held_out``, in their order.
    validation_rankings: tuple[LabelledQuery, ...]
    held_out_rankings: tuple[LabelledQuery, ...]
    #: τ of the held-out queries from the noise half that does not judge, and whether the halves are disjoint.
    other_half: FloatArray | None
    held_out_split: str


class Refresher:
    """Makes candidates for one model. Reads and writes Postgres, writes release directories."""

    def __init__(self, engine: Engine, release_root: Path, features: FeatureRows, settings: RefreshSettings,
                 sketches: SketchRows | None = None, evidence: EvidenceRows | None = None, *,
                 before_activation: Callable[[str], object] = lambda release_id: None) -> None:
        """``before_activation(release_id)``: what was added while the release was made is to be found in it, too."""
        self._engine = engine
        self._catalog = CatalogStore(engine)
        self._rankings = RankingStore(engine)
        self._registry = ReleaseRegistry(engine)
        self._root = release_root
        self._features = features
        self._settings = settings
        self._sketches = sketches
        self._evidence = evidence
        self._before_activation = before_activation

    def run_once(self, *, now: datetime, seed: int, due: Sequence[Due] = (),
                 progress: Progress = lambda what, done, total: None) -> RefreshOutcome:
        """Fit, judge, publish. ``due`` says why, for the manifest.

        Raises LabelsNotUsable if there is nothing to learn from or to judge by.
        """
        settings = self._settings
        failpoint("trainer.before_snapshot")
        model = self._catalog.model(settings.model_id)
        snapshot_at = self._database_time()
        items = self._catalog.items(model.corpus_id)
        splits = load_splits(self._rankings, settings.model_id, settings.teacher_family)
        active = self._registry.active(settings.model_id)
        record = self._registry.get(active.release_id) if active else None
        labels = self._labels(splits, items, progress)
        previous = self._comparable_head(record)
        failpoint("trainer.before_fit")
        candidates = self._fit(labels, seed, previous, due, record, progress)
        chosen = best_of(candidates)
        failpoint("trainer.after_fit")
        fitted = chosen.fitted
        calibration = self._calibrated(labels, fitted.head, items, seed, progress)
        report, decision = self._judge(labels, fitted, previous, calibration, seed)
        sketches, why_not = self._sketched(items, progress)
        progress("build the release", 0, 1)
        failpoint("trainer.before_write")
        directory = build_release(
            self._root, model_id=model.model_id, model_revision=model.revision, corpus_id=model.corpus_id,
            head=fitted.head, feature_spec=self._features.spec, preprocessing_hash=self._features.preprocessing_hash,
            item_ids=labels.train.item_ids, item_features=labels.train.item_features, catalogue=items,
            calibrator=calibration.calibrator.to_json(),
            metrics={**_metrics(report, decision, chosen, labels), "sketches": {"left_out": why_not},
                     "calibration": calibration.to_json()},
            parent=record.release_id if record else None, sketches=sketches, keyring=self._settings.keyring,
            labels=LabelSet(queries=len(splits.train) + len(splits.validation), digest=splits.digest),
            teacher_id=settings.teacher_family, golden_features=labels.validation.query_features[:GOLDEN_QUERIES],
            created_at=now, git_sha=settings.git_sha, index_factory=settings.index_factory,
            index_queries=labels.validation.query_features,
            refresh=_refresh_section(due, snapshot_at, chosen, candidates, labels),
            labelled=LabelledPlaces.of(
                labels.train.query_features, [one.near_duplicate_group for one in splits.train], seed
            ),
        )
        failpoint("trainer.after_write")
        progress("build the release", 1, 1)
        manifest = ReleaseManifest.read(directory)
        failpoint("trainer.before_register")
        self._registry.register(manifest, directory)
        failpoint("trainer.after_register")
        activated = self._publish(manifest.release_id, decision, active)
        return RefreshOutcome(manifest.release_id, activated, decision, report, chosen.start, tuple(due))

    def _database_time(self) -> datetime:
        """Before anything is read: what comes later is not in this snapshot."""
        with transaction(self._engine) as connection:
            found: datetime = connection.execute(select(func.clock_timestamp())).scalar_one()
        return found.astimezone(UTC)

    def _labels(self, splits: LabelSplits, items: Sequence[Item], progress: Progress) -> _Labels:
        cutoff = self._settings.cutoff
        if not splits.train or not splits.validation:
            raise LabelsNotUsable(
                f"there are {len(splits.train)} training and {len(splits.validation)} validation rankings of "
                f"{self._settings.model_id} by {self._settings.teacher_family}; both are needed. "
                "Import a snapshot (`byline labels import`) or wait for curation"
            )
        validation = judging_queries(splits.validation, cutoff)
        test = judging_queries(splits.test, cutoff)
        use_test = len(test) >= MINIMUM_TEST_QUERIES
        held_out = test if use_test else validation
        ids = np.asarray([item.item_id for item in items], dtype=np.int64)
        item_rows = self._features.of_items(items, lambda done, total: progress("features of items", done, total))

        def build(rankings: Sequence[LabelledQuery], half: int) -> LabelledSet:
            rows = self._features.of_queries(rankings, lambda done, all_: progress("features of queries", done, all_))
            return labelled_set(rankings, rows, ids, item_rows, half, errors=self._settings.weighted and half == LEARN)

        disjoint = all(ranking.tau_halves is not None for ranking in held_out)
        return _Labels(
            splits, build(splits.train, LEARN), build(validation, JUDGE), build(held_out, JUDGE),
            tuple(validation), tuple(held_out),
            build(held_out, LEARN).tau if disjoint else None, "test" if use_test else "validation",
        )

    def _sketched(self, items: Sequence[Item], progress: Progress) -> tuple[SketchParts | None, str | None]:
        """The release's sketches, or None and why it has none: a head is published without them, too."""
        if self._sketches is None:
            return None, "this trainer makes none"
        try:
            found = self._sketches.of_items(items, lambda done, total: progress("sketches of items", done, total))
        except BylineError as error:
            log.error("sketches_left_out", reason=error.reason, error=error.message)
            return None, f"{error.reason}: {error.message}"
        if found is None:
            log.warning("sketches_left_out", reason="the model has none: fit them with `byline sketches fit`")
            return None, "the model has none"
        return found, None

    def _comparable_head(self, record: ReleaseRecord | None) -> Previous | None:
        """The active head, if it takes the features this trainer makes."""
        if record is None or record.manifest.feature_spec != self._features.spec:
            return None
        if record.manifest.preprocessing_hash != self._features.preprocessing_hash:
            return None
        return Previous(load_head(record.directory / HEAD), float(record.metrics.get("fit", {}).get("slope") or 1.0))

    def _fit(self, labels: _Labels, seed: int, previous: Previous | None, due: Sequence[Due],
             record: ReleaseRecord | None, progress: Progress) -> list[Candidate]:
        settings = self._settings
        names, dims = zip(*self._features.blocks, strict=True)
        config = HeadConfig.of_encoders(names, dims, settings.hidden, settings.out_dim, settings.width)
        changed = record is None or record.manifest.labels.digest != labels.splits.digest
        plan = FitPlan(settings.loss, settings.epochs, settings.cutoff, settings.weighted)
        return fit_candidates(
            labels.train, labels.validation, config, plan, seed, previous,
            keep=any(one.trigger is Trigger.CORPUS for one in due), learn=needs_fit(due, changed), progress=progress,
        )  # fmt: skip

    def _calibrated(self, labels: _Labels, head: Head, items: Sequence[Item], seed: int, progress: Progress
                    ) -> Calibration:
        held = HeldOut(labels.held_out, labels.held_out_rankings) if labels.held_out_split == "test" else None
        rows = CalibrationRows(self._features, self._evidence, [item.caption for item in items], progress)
        return calibrate(
            head.embed_queries, head.embed_items(labels.held_out.item_features),
            HeldOut(labels.validation, labels.validation_rankings), held, rows, top=self._settings.cutoff, seed=seed,
        )

    def _judge(self, labels: _Labels, fitted: FitReport, previous: Previous | None, calibration: Calibration, seed: int
               ) -> tuple[HeadReport, GateDecision]:
        held_out, cutoff = labels.held_out, self._settings.cutoff
        scores = fitted.head.scores(held_out.query_features, held_out.item_features)
        report = report_head(scores, held_out, labels.train, list(self._features.blocks), cutoff=cutoff,
                             other_half=labels.other_half, seed=seed)
        active: MapResult | None = None
        if previous is not None:
            before = previous.head.scores(held_out.query_features, held_out.item_features)
            active = mean_average_precision(before, held_out.tau, cutoff)
        candidate = mean_average_precision(scores, held_out.tau, cutoff)
        evidence = GateEvidence(candidate, active, fitted.slope, score_agreement(scores, held_out.tau),
                                calibration.curve, calibration.abstention)
        return report, judge(evidence, self._settings.limits, seed)

    def _publish(self, release_id: str, decision: GateDecision, active: ActiveRelease | None) -> bool:
        if not decision.passed:
            self._registry.reject(release_id, "; ".join(decision.reasons))
            return False
        self._registry.validate(release_id)
        try:
            self._before_activation(release_id)
        except BylineError as error:  # those items are found a moment later, by the thread that keeps the deltas
            log.warning("delta_not_made", release_id=release_id, reason=error.reason, error=error.message)
        failpoint("trainer.before_activate")
        try:
            self._registry.activate(self._settings.model_id, release_id, expected_epoch=active.epoch if active else 0,
                                    reason="passed the gate", principal="trainer")
        except ReleaseChanged:
            # The candidate was judged against a release that is no longer the active one: leave it VALIDATED,
            # the next refresh compares anew and an operator may activate it.
            log.warning("release_not_activated", release_id=release_id, why="another activation came first")
            return False
        failpoint("trainer.after_activate")
        return True


def _refresh_section(due: Sequence[Due], snapshot_at: datetime, chosen: Candidate, tried: Sequence[Candidate],
                     labels: _Labels) -> RefreshSection:
    judged = hashlib.sha256()
    for ranking in labels.held_out_rankings:
        judged.update(ranking.query_id.bytes)
    return RefreshSection(
        triggers=tuple(RefreshTrigger(trigger=one.trigger.value, detail=one.detail) for one in due),
        snapshot_at=snapshot_at, start=chosen.start.value,
        validation_map={one.start.value: one.fitted.best_map for one in tried if math.isfinite(one.fitted.best_map)},
        held_out_split=labels.held_out_split, held_out_queries=len(labels.held_out_rankings),
        held_out_digest=judged.hexdigest(),
    )  # fmt: skip


def _metrics(report: HeadReport, decision: GateDecision, chosen: Candidate, labels: _Labels) -> dict[str, Any]:
    fitted = chosen.fitted
    # JSON knows no NaN, and Postgres refuses it: what could not be measured is null.
    measured = {name: value if np.isfinite(value) else None for name, value in decision.metrics.items()}
    return {
        **report.to_json(), "gate": {**measured, "passed": decision.passed, "reasons": list(decision.reasons)},
        "fit": {"best_step": fitted.best_step, "validation_map": fitted.best_map, "start_map": fitted.start_map,
                "slope": fitted.slope, "warm_start": chosen.start is Start.WARM,
                "history": [[point.step, point.validation_map] for point in fitted.history]},
        "labels": {"train": len(labels.splits.train), "validation": len(labels.splits.validation),
                   "test": len(labels.splits.test), "held_out_split": labels.held_out_split,
                   "judged_on_disjoint_noise": labels.other_half is not None},
    }
