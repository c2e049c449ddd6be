"""One refresh: labels in, a judged release out.

Why it exists: service loop, demo and tests run exactly this. Nothing is decided here that could be decided by a pure
function (``schedule``, ``gate``, the fit, the report); this module only brings their inputs together and records the
outcome. A candidate that fails the gate is built and registered too, as REJECTED: one must be able to look at it.
Everything is read once, at the beginning: labels that come while a head is fitted are the next refresh's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from sqlalchemy import Engine

from byline.catalog.items import Item
from byline.catalog.store import CatalogStore
from byline.db.session import database_time
from byline.errors import BylineError, FeatureMismatch, ReleaseChanged
from byline.evaluation.calibrate import Calibration
from byline.evaluation.head_report import HeadReport, report_head
from byline.evaluation.map import MapResult, mean_average_precision
from byline.failpoints import failpoint
from byline.index import AUTO
from byline.ranker.fit import FitReport
from byline.ranker.head import Head, HeadConfig, load_head
from byline.rankings.calibration_rows import CalibrationRows, EvidenceRows, HeldOut, calibrate
from byline.rankings.labelled import load_splits
from byline.rankings.store import RankingStore
from byline.releases.builder import build_release
from byline.releases.labelled import LabelledPlaces
from byline.releases.manifest import HEAD, LabelSet, ReleaseManifest
from byline.releases.registry import ActiveRelease, ReleaseRecord, ReleaseRegistry
from byline.releases.sketches import SketchParts
from byline.releases.vouched import vouched
from byline.security.signing import NOT_SIGNED, Keyring
from byline.telemetry import get_logger
from services.trainer.candidates import Candidate, FitPlan, Previous, Start, by_validation, fit_candidates
from services.trainer.gate import GateDecision, GateEvidence, GateLimits, judge, score_agreement
from services.trainer.labels import FeatureRows, Progress, RefreshLabels, read_labels
from services.trainer.record import Judged, metrics_of, refresh_section
from services.trainer.schedule import Due, Trigger, needs_fit
from services.trainer.slices import Cuts, cuts_of

log = get_logger(__name__)

#: Queries kept in the release to check after loading that it still gives the same answers.
GOLDEN_QUERIES = 8


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
    #: Signs the manifest, if it has a key, and must have signed the one it starts from.
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

    def run_once(self, *, now: datetime, seed: int, due: Sequence[Due] = (), keep_head: bool = False,
                 progress: Progress = lambda what, done, total: None) -> RefreshOutcome:
        """Fit, judge, publish. ``due`` says why, for the manifest; ``keep_head``: with the active head and no other.

        Raises LabelsNotUsable if there is nothing to learn from or to judge by, CorpusNotUsable if many images are
        lost, FeatureMismatch if the active head is to be kept and takes other features.
        """
        settings = self._settings
        failpoint("trainer.before_snapshot")
        model = self._catalog.model(settings.model_id)
        snapshot_at = database_time(self._engine)  # before anything is read: what comes later is not in this snapshot
        items = self._catalog.items(model.corpus_id)
        splits = load_splits(self._rankings, settings.model_id, settings.teacher_family)
        active = self._registry.active(settings.model_id)
        record = self._registry.get(active.release_id) if active else None
        previous = self._comparable_head(record)
        if keep_head and previous is None:
            raise FeatureMismatch(
                f"the head that answers for {settings.model_id} does not take {self._features.spec}, and after a "
                "rollback no other is fitted: ask for a refresh (`byline releases refresh`)"
            )
        labels = read_labels(
            splits, items, self._features, settings.cutoff, settings.teacher_family, progress,
            weighted=settings.weighted,
        )
        failpoint("trainer.before_fit")
        candidates = self._fit(labels, seed, previous, due, record, keep_head, progress)
        failpoint("trainer.after_fit")
        judged = self._judged(labels, candidates, previous, seed, progress)
        # All refused: the one that validates best is recorded.
        best = next((one for one in judged if one.decision.passed), judged[0])
        head = best.candidate.fitted.head
        sketches, why_not = self._sketched(labels.items, progress)
        progress("build the release", 0, 1)
        failpoint("trainer.before_write")
        directory = build_release(
            self._root, model_id=model.model_id, model_revision=model.revision, corpus_id=model.corpus_id,
            head=head, feature_spec=self._features.spec, preprocessing_hash=self._features.preprocessing_hash,
            item_ids=labels.train.item_ids, item_features=labels.train.item_features, catalogue=labels.items,
            calibrator=best.calibration.calibrator.to_json(), metrics=metrics_of(best, judged, labels, why_not),
            parent=record.release_id if record else None, sketches=sketches, keyring=self._settings.keyring,
            labels=LabelSet(queries=len(splits.train) + len(splits.validation), digest=splits.digest),
            teacher_id=settings.teacher_family, golden_features=labels.validation.query_features[:GOLDEN_QUERIES],
            created_at=now, git_sha=settings.git_sha, index_factory=settings.index_factory,
            index_queries=labels.validation.query_features,
            refresh=refresh_section(due, snapshot_at, best.candidate, candidates, labels),
            labelled=LabelledPlaces.of(
                labels.train.query_features, [one.near_duplicate_group for one in labels.train_rankings], seed
            ),
        )
        failpoint("trainer.after_write")
        progress("build the release", 1, 1)
        manifest = ReleaseManifest.read(directory)
        failpoint("trainer.before_register")
        self._registry.register(manifest, directory)
        failpoint("trainer.after_register")
        activated = self._publish(manifest.release_id, best.decision, active)
        start = best.candidate.start
        return RefreshOutcome(manifest.release_id, activated, best.decision, best.report, start, tuple(due))

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
        vouched(record.directory, self._settings.keyring, record.manifest, (HEAD,))
        return Previous(load_head(record.directory / HEAD), float(record.metrics.get("fit", {}).get("slope") or 1.0))

    def _fit(self, labels: RefreshLabels, seed: int, previous: Previous | None, due: Sequence[Due],
             record: ReleaseRecord | None, keep_head: bool, progress: Progress) -> list[Candidate]:
        settings = self._settings
        names, dims = zip(*self._features.blocks, strict=True)
        config = HeadConfig.of_encoders(names, dims, settings.hidden, settings.out_dim, settings.width)
        changed = record is None or record.manifest.labels.digest != labels.splits.digest
        plan = FitPlan(settings.loss, settings.epochs, settings.cutoff, settings.weighted)
        found = fit_candidates(
            labels.train, labels.validation, config, plan, seed, previous,
            keep=keep_head or any(one.trigger is Trigger.CORPUS for one in due),
            learn=not keep_head and needs_fit(due, changed), progress=progress,
        )  # fmt: skip
        return by_validation(found)

    def _judged(self, labels: RefreshLabels, candidates: Sequence[Candidate], previous: Previous | None, seed: int,
                progress: Progress) -> list[Judged]:
        """What the gate says of the candidates in their order, up to the first that passes."""
        cuts = cuts_of(labels, self._features.blocks, seed) if previous is not None else {}
        found: list[Judged] = []
        for one in candidates:
            calibration = self._calibrated(labels, one.fitted.head, seed, progress)
            report, decision = self._judge(labels, one.fitted, previous, calibration, cuts, seed)
            found.append(Judged(one, calibration, report, decision))
            if decision.passed:
                break
            log.info("candidate_refused", start=one.start.value, reasons=list(decision.reasons))
        return found

    def _calibrated(self, labels: RefreshLabels, head: Head, seed: int, progress: Progress) -> Calibration:
        held = HeldOut(labels.held_out, labels.held_out_rankings) if labels.held_out_split == "test" else None
        captions = [item.caption for item in labels.items]
        rows = CalibrationRows(self._features, self._evidence, captions, progress)
        return calibrate(
            head.embed_queries, head.embed_items(labels.held_out.item_features),
            HeldOut(labels.validation, labels.validation_rankings), held, rows, top=self._settings.cutoff, seed=seed,
        )

    def _judge(self, labels: RefreshLabels, fitted: FitReport, previous: Previous | None, calibration: Calibration,
               cuts: Cuts, seed: int) -> tuple[HeadReport, GateDecision]:
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
                                calibration.curve, calibration.abstention, cuts)
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
