"""``python -m services.curation``: reads the settings, connects, and curates until a signal ends it.

Why it exists: it is the composition root, the only place that knows which database, which generator
and which features curation uses.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Iterator, Sequence

from sqlalchemy import func, select

from byline import telemetry
from byline.catalog.blobs import BlobStore
from byline.catalog.store import CatalogStore
from byline.config import Settings, load_settings
from byline.db import make_engine
from byline.db.models import Base
from byline.db.session import transaction
from byline.errors import BylineError, SettingsInvalid
from byline.jobs.states import Stage
from byline.jobs.store import JobStore
from byline.rankings.store import RankingStore
from services.curation.loop import Curator
from services.curation.plan import PlannedQuery, plan_queries
from services.curation.produce import Labelling, Producer

log = telemetry.get_logger(__name__)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m services.curation",
        description="Keeps a target number of ranking jobs open, so that labels never stop coming: plans a prompt, "
        "generates its picture, chooses candidates, enqueues the ranking. Settings come from BYLINE_* variables "
        "(BYLINE_CURATION_*); SIGTERM stops it.",
    )
    parser.add_argument("--metrics-port", type=int, default=0, help="serve Prometheus metrics here (0: off)")
    return parser


def live_plan(
    catalog: CatalogStore, rankings: RankingStore, corpus_id: str, model_id: str, seed: int
) -> Iterator[PlannedQuery]:
    """The plan from its start, by the corpus and the stored queries of this moment."""
    # Withdrawn items stay in it: without them groups would fall apart and splits be drawn again.
    items = catalog.items(corpus_id, include_withdrawn=True)
    withdrawn = {item.item_id for item in items} - {item.item_id for item in catalog.items(corpus_id)}
    return plan_queries(items, seed, rankings.splits_of_prompts(model_id), withdrawn)


def make_curator(settings: Settings, stop: threading.Event) -> Curator | None:
    """Connect and load; waits for a corpus to be ingested first. None if ``stop`` was set meanwhile."""
    engine = make_engine(settings.database_url, pool_size=2, application="byline-curation")
    catalog, blobs = CatalogStore(engine), BlobStore(settings.blob_dir)
    while not catalog.items(settings.corpus_id):
        if stop.wait(settings.curation_poll_seconds):
            return None
    import torch

    from byline.diffusion.model import DiffusionModel
    from byline.features.extractor import load_extractor
    from byline.rankings.features import LabelFeatures
    from services.curation.generate import Generator, Prefilter

    torch.set_num_threads(settings.torch_threads)
    model = DiffusionModel.load(settings.model_directory, settings.device)
    extractor = load_extractor(settings.feature_spec, device=settings.device, model=model, cache=settings.cache_dir)
    features = LabelFeatures(extractor, blobs, settings.cache_dir, settings.corpus_id)
    store = JobStore(engine, {Stage.RANK: settings.verification_queue_bound})
    rankings = RankingStore(engine)
    producer = Producer(
        engine,
        store,
        rankings,
        blobs,
        settings.model_id,
        Labelling(settings.curation_teacher, settings.curation_draws, settings.curation_teacher_settings),
        Generator(model, settings.curation_sampling_steps, settings.curation_guidance),
        None if settings.curation_candidates == 0 else Prefilter(
            catalog, features, extractor, settings.corpus_id,
            count=settings.curation_candidates, explore_share=settings.curation_explore_share,
        ),
        settings.job_ttl_seconds,
        stop.is_set,
    )  # fmt: skip

    def open_jobs() -> int:
        return sum(depth.queued + depth.running for depth in store.depths() if depth.stage is Stage.RANK)

    def count_rankings() -> int:
        table = Base.metadata.tables["rankings"]
        with transaction(engine) as connection:
            statement = select(func.count()).select_from(table).where(table.c.model_id == settings.model_id)
            return int(connection.execute(statement).scalar_one())

    return Curator(
        producer,
        lambda: live_plan(catalog, rankings, settings.corpus_id, settings.model_id, settings.seed),
        open_jobs,
        count_rankings,
        target_open=settings.curation_target_open,
        max_rankings=settings.curation_max_rankings,
        batch=settings.curation_batch,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT; returns the exit code."""
    arguments = parser().parse_args(argv)
    try:
        settings = load_settings()
        telemetry.configure_logging("curation", settings)
        stop = threading.Event()
        telemetry.install_signal_handlers(stop)
        telemetry.start_metrics(arguments.metrics_port)
        curator = make_curator(settings, stop)
    except SettingsInvalid as error:
        print(error, file=sys.stderr)
        return 2
    except BylineError as error:
        log.error("curation_cannot_start", reason=error.reason, error=error.message)
        return 1
    if curator is not None:
        log.info("curation_started", target_open=settings.curation_target_open)
        curator.run(stop, settings.curation_poll_seconds)
    log.info("curation_stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
