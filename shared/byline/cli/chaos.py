"""``make chaos``: ten thousand jobs while everything dies in turn; the verdict, the seed and the history are kept.

Why it exists: "nothing is lost" is a sentence until somebody tries. Starts real servers and services on a tiny model
under a temporary folder, attacks them, and proves promises 1 to 7 from what was written down (docs/chaos.md).

    python -m byline.cli.chaos --jobs 500 --faults postgres_killed lookup_suspended
    python -m byline.cli.chaos --check reports/chaos/history.jsonl.gz
"""

from __future__ import annotations

import argparse
import logging
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from byline.catalog.blobs import BlobStore
from byline.chaos.build import CORPUS_ID, FEATURES, MODEL_ID, build_world
from byline.chaos.checker import check
from byline.chaos.history import History
from byline.chaos.plan import plan
from byline.chaos.run import Outcome, attack
from byline.chaos.system import COMMANDS, environment_of, start_servers
from byline.evaluation.result_file import git_commit, write_result

log = logging.getLogger("chaos")
ROOT = Path(__file__).resolve().parents[3]
LEASE_S = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run, or check a history that was kept; the exit code says whether every promise held."""
    a = _parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if a.check is not None:
        verdict = check(History.read(a.check))
        for found in verdict.violations:
            print(f"promise {found.promise}, job {found.job}: {found.how}")
        held = "every promise held" if verdict.passed else f"{len(verdict.violations)} VIOLATIONS"
        print(f"{verdict.jobs} jobs, {verdict.answers} answers read: {held}")
        return 0 if verdict.passed else 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing stays behind
    begun = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="byline-chaos-"))
    try:
        outcome = run(a, folder)
    finally:
        if a.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            shutil.copytree(folder, a.keep, dirs_exist_ok=True, ignore=shutil.ignore_patterns("postgres", "valkey"))
            shutil.rmtree(folder, ignore_errors=True)
    history = a.out / "history.jsonl.gz"
    outcome.history.write(history)
    shown = str(history.relative_to(ROOT)) if history.is_relative_to(ROOT) else str(history)
    by_make = argv is None and len(sys.argv) == 1
    command = "make chaos" if by_make else f"python -m byline.cli.chaos {' '.join(sys.argv[1:])}"
    write_result(
        a.out / "result.json", {**outcome.figures, "history": shown}, command=command,
        seconds=time.monotonic() - begun, commit=git_commit(ROOT), seed=a.seed,
    )  # fmt: skip
    shown_figures = ("jobs", "kills", "lost", "duplicated", "mixed", "withdrawn_seen", "passed")
    log.info("; ".join(f"{name} {outcome.figures[name]}" for name in shown_figures))
    return 0 if outcome.verdict.passed else 1


def run(a: argparse.Namespace, folder: Path) -> Outcome:
    """The whole run under ``folder``; nothing of it is left running."""
    system = start_servers(folder)
    try:
        system.services = tuple(a.services)
        system.environment = environment_of(system, settings(folder))
        log.info("building the tiny world")
        world = build_world(folder, system.engine, BlobStore(folder / "blobs"), a.corpus, a.seed)
        for name in system.services:
            system.start(name)
        for name in system.services:
            system.ready(name)
        log.info("everything is up; %d jobs", a.jobs)
        asks = plan(a.jobs, a.seed, verified=a.verified, estimated=a.estimated, by_image=a.by_image)
        return attack(
            system, world, asks, seed=a.seed, lease_s=LEASE_S, model_id=MODEL_ID, corpus_id=CORPUS_ID, only=a.faults,
            rounds=a.rounds,
        )  # fmt: skip
    finally:
        system.stop()


def settings(folder: Path) -> Mapping[str, str]:
    """Settings of every service: short leases, many attempts, narrow queues, a curation and a trainer that hurry."""
    values = {
        "model_id": MODEL_ID, "corpus_id": CORPUS_ID, "model_directory": folder / "model", "feature_spec": FEATURES,
        "lease_seconds": LEASE_S, "max_attempts": 20, "verify_draws": 16, "estimate_draws": 16,
        "lookup_queue_bound": 1000, "verification_queue_bound": 100, "canary_seconds": 10,
        "curation_target_open": 1, "curation_batch": 2, "curation_candidates": 8, "curation_draws": 8,
        "curation_sampling_steps": 2, "curation_max_rankings": 200,
        "trainer_min_new_rankings": 12, "trainer_interval_seconds": 120, "trainer_poll_seconds": 3, "trainer_epochs": 2,
        # Candidates are built, written and refused: what answers is for the run to decide.
        "gate_map_floor": 1.0,
    }  # fmt: skip
    return {f"BYLINE_{name.upper()}": str(value) for name, value in values.items()}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--verified", type=int, default=None, help="of them VERIFIED (default 2 %%)")
    parser.add_argument("--estimated", type=int, default=None, help="of them ESTIMATED (default 2 %%)")
    parser.add_argument("--by-image", type=int, default=None, help="of them RETRIEVED by image (default 2 %%)")
    parser.add_argument("--faults", nargs="*", default=[], help="only these, by name")
    parser.add_argument("--services", nargs="*", default=list(COMMANDS), choices=list(COMMANDS))
    parser.add_argument("--rounds", type=int, default=1, help="how often each fault is done")
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--corpus", type=Path, default=ROOT / "data/openclipart/items.parquet")
    parser.add_argument("--out", type=Path, default=ROOT / "reports/chaos")
    parser.add_argument("--keep", type=Path, default=None, help="copy logs and releases there")
    parser.add_argument("--check", type=Path, default=None, help="judge this history instead of making one")
    a = parser.parse_args(argv)
    for name in ("verified", "estimated", "by_image"):
        if getattr(a, name) is None:
            setattr(a, name, a.jobs // 50)
    return a


if __name__ == "__main__":
    sys.exit(main())
