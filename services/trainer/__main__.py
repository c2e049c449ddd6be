"""``python -m services.trainer``: reads the settings, connects, and refreshes the head until a signal ends it.

Why it exists: it is the composition root, the only place that knows which Postgres, which encoders and which clock the
trainer uses. ``--once`` runs one refresh now and prints what became of it, for the demo and for an operator.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import Engine

from byline import telemetry
from byline.catalog.blobs import BlobStore
from byline.catalog.store import CatalogStore
from byline.config import Settings, load_settings, repository_root
from byline.db.session import make_engine
from byline.errors import BylineError, ModelNotFound, SettingsInvalid
from byline.evaluation.result_file import git_commit
from byline.releases.garbage import KeepRule
from byline.security.signing import Keyring
from services.trainer.additions_setup import start_additions
from services.trainer.alarms import DriftAlarms
from services.trainer.gate import GateLimits
from services.trainer.loop import TrainerLoop, report
from services.trainer.observe import Observer
from services.trainer.progress import StepProgress
from services.trainer.refresh import Refresher, RefreshOutcome, RefreshSettings
from services.trainer.schedule import Due, LastRefresh, RefreshRule, Trigger
from services.trainer.work import TrainerWork

log = telemetry.get_logger(__name__)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m services.trainer",
        description="Fits a head when enough new rankings are there, judges it on held-out queries, and publishes it "
        "as a release if it passes the gate. Run one per model. Settings come from BYLINE_* variables; SIGTERM stops "
        "it after the refresh that runs.",
    )
    parser.add_argument("--once", action="store_true", help="refresh now, print the outcome as JSON, and end")
    parser.add_argument("--additions", action="store_true",
                        help="only embed items that are added to the corpus; run more of these where many come at once")
    parser.add_argument("--metrics-port", type=int, default=0, help="serve Prometheus metrics here (0: off)")
    return parser


def refresh_settings(settings: Settings) -> RefreshSettings:
    """The part of the settings a refresh needs."""
    limits = GateLimits(map_floor=settings.gate_map_floor, tolerance=settings.gate_regression_tolerance,
                        confidence=settings.gate_confidence, calibration_error=settings.gate_calibration_error,
                        false_attribution=settings.gate_false_attribution,
                        slice_tolerance=settings.gate_slice_tolerance)
    return RefreshSettings(
        model_id=settings.model_id, teacher_family=settings.curation_family, cutoff=settings.gate_map_at,
        limits=limits, loss=settings.trainer_loss, weighted=settings.trainer_weighted, epochs=settings.trainer_epochs,
        width=settings.trainer_width, git_sha=git_commit(repository_root()), index_factory=settings.index_factory,
        keyring=Keyring.parse(settings.signing_key),
    )


class Encoding:
    """Builds the refresher on first use: encoders take seconds and memory, and the model may not be registered yet."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings
        self._refresher: Refresher | None = None

    def refresher(self) -> Refresher:
        """The refresher, built once."""
        self._refresher = self._refresher or self._build()
        return self._refresher

    def _build(self) -> Refresher:
        import torch

        from byline.diffusion.model import DiffusionModel
        from byline.features import load_extractor
        from byline.rankings.features import LabelFeatures
        from byline.rankings.query_evidence import QueryEvidence
        from byline.teachers.files import TeacherFiles
        from services.trainer.additions import Additions
        from services.trainer.sketches import CorpusSketches

        settings = self._settings
        torch.set_num_threads(settings.torch_threads)
        record = CatalogStore(self._engine).model(settings.model_id)
        model = DiffusionModel.load(record.directory, settings.device)
        extractor = load_extractor(settings.feature_spec, device=settings.device, model=model, cache=settings.cache_dir)
        blobs = BlobStore(settings.blob_dir)
        features = LabelFeatures(extractor, blobs, settings.cache_dir, record.corpus_id)
        sketches = CorpusSketches(
            TeacherFiles.beside(record.directory, settings.cache_dir, record.revision), record.revision, blobs,
            lambda: model, settings.curation_selection,
        )
        evidence = QueryEvidence(extractor, model, blobs, settings.cache_dir, record.corpus_id, seed=settings.seed)
        keyring = Keyring.parse(settings.signing_key)
        additions = Additions(self._engine, settings.model_id, lambda manifest: features, keyring=keyring)
        return Refresher(self._engine, settings.release_dir, features, refresh_settings(settings), sketches, evidence,
                         before_activation=additions.catch_up)


def main(argv: Sequence[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT; returns the exit code."""
    arguments = parser().parse_args(argv)
    try:
        settings = load_settings()
        telemetry.configure_logging("trainer", settings)
        engine = make_engine(settings.database_url, pool_size=4, application="byline-trainer")
    except SettingsInvalid as error:
        print(error.message, file=sys.stderr)
        return 2
    rule = RefreshRule(settings.trainer_min_new_rankings, timedelta(seconds=settings.trainer_interval_seconds),
                       timedelta(seconds=settings.trainer_settle_seconds))
    alarms = DriftAlarms(engine)
    observer = Observer(engine, settings.model_id, settings.curation_family, alarms)
    work = TrainerWork(engine, settings.model_id, settings.release_dir, observer, rule,
                       Encoding(engine, settings).refresher, keep_rule(settings), settings.seed, alarms,
                       lambda: purge_withdrawn(engine, settings))
    if arguments.once:
        return _once(work, observer)
    stop = threading.Event()
    telemetry.install_signal_handlers(stop)
    telemetry.start_metrics(arguments.metrics_port)
    additions = start_additions(settings, stop)
    if arguments.additions:
        stop.wait()
        return 0

    def refresh(now: datetime, last: LastRefresh | None) -> RefreshOutcome | None:
        with StepProgress() as progress:
            return work.run(now, last=last, progress=progress)

    loop = TrainerLoop(look=observer.look, last=observer.last, refresh=refresh, rule=rule,
                       now=observer.now, stop=stop, poll_s=settings.trainer_poll_seconds, tidy=work.tidy)
    log.info("trainer_started", model_id=settings.model_id, teacher=settings.curation_family)
    loop.run()
    additions.join(timeout=5.0)
    engine.dispose()
    log.info("trainer_stopped")
    return 0


def purge_withdrawn(engine: Engine, settings: Settings) -> None:
    """Remove withdrawn items from all files, where the releases that answer are made without them."""
    from byline.releases.purge import Places, purge

    corpus_id = CatalogStore(engine).model(settings.model_id).corpus_id
    keyring = Keyring.parse(settings.signing_key)
    purge(engine, Places(settings.release_dir, settings.cache_dir, BlobStore(settings.blob_dir), keyring), corpus_id)


def keep_rule(settings: Settings) -> KeepRule:
    """Which old releases keep their files, by the settings."""
    return KeepRule(settings.release_keep, timedelta(days=settings.release_keep_days))


def _once(work: TrainerWork, observer: Observer) -> int:
    started = time.monotonic()
    try:
        with StepProgress() as progress:
            outcome = work.run(observer.now(), [Due(Trigger.OPERATOR, "--once")], progress=progress)
    except ModelNotFound as error:
        print(f"{error.message}: ingest the corpus and register the model first", file=sys.stderr)
        return 1
    except BylineError as error:
        print(f"{error.reason}: {error.message}", file=sys.stderr)
        return 1
    if outcome is None:
        print("another trainer of this model is at work", file=sys.stderr)
        return 1
    report(outcome, time.monotonic() - started)
    print(json.dumps({"release_id": outcome.release_id, "activated": outcome.activated,
                      "reasons": list(outcome.decision.reasons), "start": outcome.start.value,
                      **outcome.report.to_json()}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
