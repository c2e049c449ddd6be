"""``make study-refresh``: a year of the loop in minutes; JSON and figure into ``reports``, tables into docs/refresh.md.

Why it exists: ``byline.simulation`` lives the year; here are the files it is lived on. The teacher is the label file:
its rankings were measured before, so a label costs nothing here but its place in the budget. Years that are done are
kept; a killed run goes on with the next one.

    python -m studies.refresh --size tiny
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byline.config import Settings, load_settings, repository_root

if TYPE_CHECKING:
    from byline.simulation.pieces import Pieces
    from byline.simulation.settings import Subject, YearSettings
    from byline.simulation.world import Corpus

log = logging.getLogger("study-refresh")


def main(argv: Sequence[str] | None, pieces: Pieces) -> None:
    """Live the years that are not kept yet, and write the result."""
    import torch

    from byline.evaluation.result_file import git_commit, write_result
    from byline.evaluation.study_report import put_block
    from byline.simulation.figures import draw, markdown
    from byline.simulation.summary import labels_to_target, timeline

    a = _parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(a.threads)
    settings = sized(a.size, a.seeds)
    corpus = read(load_settings(), settings, tiny=a.size == "tiny")
    found = run(corpus, settings, pieces, a.work, git_commit(repository_root()))
    every = [year for s in found["subjects"].values() for years in s["years"].values() for year in years]
    seconds = sum(year["seconds"] for year in every)
    target = a.out / "refresh.json"
    command = "make study-refresh" if argv is None and len(sys.argv) == 1 else " ".join(
        ["python -m studies.refresh", *(sys.argv[1:] if argv is None else argv)])
    subjects = found["subjects"]
    headline = {"timeline": timeline(subjects), "labels_to_target": labels_to_target(subjects)}
    write_result(target, headline | found | {"size": a.size}, command=command, seconds=seconds,
                 commit=git_commit(repository_root()), seed=0)
    text = markdown(found)
    log.info("wrote %s (%.0f CPU seconds in all)\n\n%s", target, seconds, text)
    drawn = draw(found, settings, target.with_suffix(".png"))
    if a.page is not None:
        picture = a.page.parent / "figures" / "study-refresh.png"
        link = "\n\n![A simulated year](figures/study-refresh.png)" if drawn and draw(found, settings, picture) else ""
        put_block(a.page, "refresh", text + link)


def sized(size: str, seeds: int) -> YearSettings:
    """The settings of a size; ``seeds`` (0: the size's own) worlds of each head at most."""
    from byline.simulation.settings import SIZES

    settings = SIZES[size]
    subjects = tuple(replace(s, seeds=min(seeds, s.seeds) if seeds else s.seeds) for s in settings.subjects)
    return replace(settings, subjects=subjects)


def read(settings: Settings, year: YearSettings, *, tiny: bool = False) -> Corpus:
    """Labels, features (encoded where the cache lacks them), catalogue and near-duplicate groups of the queries."""
    import numpy as np

    from byline.catalog.items import Item
    from byline.cli.study_files import load_data
    from byline.diffusion.model import DiffusionModel
    from byline.rankings.snapshot import read_snapshot
    from byline.simulation.world import Corpus

    model = DiffusionModel.load(settings.model_directory, settings.device)
    encoders = tuple(dict.fromkeys(["minilm", *(e for s in year.subjects for e in s.encoders), "gradient"]))
    data = load_data(settings, model, encoders, lambda what, done, total: log.info("%s: %d of %d", what, done, total),
                     items=120 if tiny else 0, queries=0)  # fmt: skip
    groups = {query.prompt: query.near_duplicate_group for query in read_snapshot(settings.labels_dir)[1]}
    rows = {int(row["item_id"]): row for row in _rows(settings.corpus_source)}
    catalogue = [Item(item_id=item.item_id, caption=item.caption, creator=rows[item.item_id]["creator"],
                      licence=rows[item.item_id]["licence"],
                      near_duplicate_group=rows[item.item_id]["near_duplicate_group"]) for item in data.items]
    return Corpus(data, catalogue, np.asarray([groups[query.prompt] for query in data.queries], dtype=np.int64))


def _rows(parquet: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    columns = ["item_id", "creator", "licence", "near_duplicate_group"]
    rows: list[dict[str, Any]] = pq.read_table(parquet, columns=columns).to_pylist()
    return rows


def run(corpus: Corpus, settings: YearSettings, pieces: Pieces, work: Path, commit: str) -> dict[str, Any]:
    """Every head, arm and seed; years already in ``work`` are read from there."""
    from byline.evaluation.kept_rows import KeptRows
    from byline.simulation.summary import summarise

    kept, subjects = KeptRows(work / "refresh.jsonl"), {}
    for subject in settings.subjects:
        years: dict[str, list[dict[str, Any]]] = {arm: [] for arm in subject.arms}
        for seed in range(subject.seeds):  # seed by seed: what is done first can be compared already
            for arm in subject.arms:
                years[arm].append(_year(corpus, settings, pieces, subject, arm, seed, kept, commit))
        subjects[subject.name] = {"years": years, "summary": summarise(years, settings)}
    facts = {key: str(value) for key, value in asdict(settings).items() if key != "subjects"}
    return {"study": "refresh", "settings": facts, "cutoff": settings.cutoff, "data": corpus.data.digest,
            "rules": pieces.digest, "teacher_id": corpus.data.teacher_id, "subjects": subjects}  # fmt: skip


def _year(corpus: Corpus, settings: YearSettings, pieces: Pieces, subject: Subject, arm: str, seed: int, kept: Any,
          commit: str) -> dict[str, Any]:
    from byline.simulation.heads import HeadMaker
    from byline.simulation.life import Year
    from byline.simulation.world import World

    lived = replace(settings, subjects=())
    facts = {"settings": repr(lived), "head": subject.name, "arm": arm, "seed": seed, "data": corpus.data.digest,
             "rules": pieces.digest, "code": _code()}  # fmt: skip
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    year: dict[str, Any] | None = kept.get(key)
    if year is None:
        started, spent = time.monotonic(), time.process_time()
        world = World(corpus, settings, seed)
        with tempfile.TemporaryDirectory(prefix="byline-year-") as folder:
            life = Year(world, HeadMaker(world, subject.encoders, pieces.make_head), pieces, arm, Path(folder), commit)
            year = life.run(_Shown(f"{subject.name}, {arm}, seed {seed}"))
        year["seconds"] = round(time.process_time() - spent, 1)
        kept.put(key, year)
        log.info("%s, %s, seed %d: mAP %.3f, %d releases, %.0f CPU seconds in %.0f", subject.name, arm, seed,
                 year["weeks"][-1]["map"], len(year["releases"]), year["seconds"], time.monotonic() - started)
    return year


class _Shown:
    """The week, as a log line every twenty seconds."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._said >= 20:
            self._said = time.monotonic()
            log.info("%s: week %d of %d", self._name, done, total)


def _code() -> str:
    """Digest of the code a year depends on: the student's, and the simulation's but for what only reports."""
    import byline.simulation as simulation
    from byline.evaluation.study_student import student_digest

    digest = hashlib.sha256(student_digest().encode())
    for name in ("world", "heads", "life", "shelf"):
        digest.update((Path(simulation.__path__[0]) / f"{name}.py").read_bytes())
    return digest.hexdigest()[:12]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    from byline.simulation.settings import SIZES

    parser = argparse.ArgumentParser(prog="python -m studies.refresh", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--size", choices=list(SIZES), default="demo")
    parser.add_argument("--seeds", type=int, default=0, help="worlds of each head at most; 0: the size's own")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--work", type=Path, default=repository_root() / ".byline/studies", help="years that are done")
    parser.add_argument("--out", type=Path, default=repository_root() / "reports/studies")
    parser.add_argument("--page", type=Path, default=None, help="document whose tables and figure are replaced")
    return parser.parse_args(argv)
