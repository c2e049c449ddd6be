"""Make the demo's label snapshot: rank the whole corpus for several hundred generated queries.

Why it exists: the demo must not begin by waiting for the teacher. This is the curation service's
own plan and the first-order teacher (all queries, whole corpus, one pass of gradients), run once,
resumable, reproducible from its seed; it also measures agreement with the exact form on a few
queries, since the snapshot is only worth what that says.

    python data/labels/make.py --queries 320 --draws 128

Writes ``data/labels/labels.{json,safetensors}``, the curvature into ``data/generator/curvature`` and
``reports/labels/agreement.json``.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import logging
import multiprocessing
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from byline.catalog.decode import encode_png
from byline.catalog.items import Item
from byline.diffusion.model import DiffusionModel
from byline.rankings.snapshot import SnapshotHeader, SnapshotQuery, read_snapshot, write_snapshot
from byline.teachers import TeacherItem, TeacherQuery
from byline.teachers.abu_plus import AbuPlus
from byline.teachers.curvature import Curvature
from byline.teachers.first_order import AbuPlusLinear
from byline.teachers.natural_gradient import UnlearningSettings
from byline.teachers.ranking import summarise
from byline.teachers.registry import ensure_curvature
from services.curation.plan import plan_queries

log = logging.getLogger("labels")
CHUNK = 16


def read_corpus(path: Path) -> tuple[list[Item], list[TeacherItem]]:
    """The corpus as catalogue items and as the teacher needs them."""
    rows = pq.read_table(path).to_pylist()
    items = [
        Item(
            item_id=r["item_id"], caption=r["caption"], keywords=tuple(r["keywords"]), creator=r["creator"],
            licence=r["licence"], source=r["source"], source_path=r["source_path"], image_sha256=r["sha256"],
            near_duplicate_group=r["near_duplicate_group"],
        )
        for r in rows
    ]  # fmt: skip
    pictures = [Image.open(io.BytesIO(r["image"])).convert("RGB") for r in rows]
    return items, [TeacherItem(i.item_id, p, i.caption) for i, p in zip(items, pictures, strict=True)]


_worker: dict[str, Any] = {}


def _teacher() -> AbuPlusLinear:
    """This worker process's teacher."""
    teacher: AbuPlusLinear = _worker["teacher"]
    return teacher


def _start(model_directory: Path, corpus: Path, settings: UnlearningSettings) -> None:
    """Load what a worker process needs; one thread each, since two processes beat two threads here."""
    torch.set_num_threads(1)
    model = DiffusionModel.load(model_directory)
    curvature = Curvature.load(model_directory / "curvature", model.revision)
    _worker["teacher"] = AbuPlusLinear(model, curvature, settings)
    _worker["items"] = read_corpus(corpus)[1]


def _directions(query: tuple[bytes, str]) -> dict[str, np.ndarray]:
    """The preconditioned gradient of one query, per layer [out, in]."""
    found = _teacher().direction(TeacherQuery(Image.open(io.BytesIO(query[0])).convert("RGB"), query[1]))
    return {name: value.numpy() for name, value in found.items()}


def _set_directions(path: Path) -> dict[str, torch.Tensor]:
    """All queries' directions, per layer [q, out, in], loaded once in each process."""
    if "directions" not in _worker:
        _worker["directions"] = {
            f.stem: torch.from_numpy(np.load(f)) for f in sorted(path.glob("*.npy"))
        }
    directions: dict[str, torch.Tensor] = _worker["directions"]
    return directions


def _score(job: tuple[int, Path]) -> tuple[int, np.ndarray]:
    """tau [items, replicates, queries] of the chunk that begins at job[0]."""
    start, path = job
    items: list[TeacherItem] = _worker["items"]
    return start, _teacher().replicates(_set_directions(path), items[start : start + CHUNK], chunk=CHUNK)


def measure_agreement(
    model: DiffusionModel, curvature: Curvature, settings: UnlearningSettings,
    items: list[TeacherItem], queries: list[TeacherQuery], candidates: int, out: Path,
) -> None:  # fmt: skip
    """Exact form against first order on random candidates, and each against itself under other noise."""
    rng = np.random.default_rng(settings.seed)
    rows = []
    for number, query in enumerate(queries):
        chosen = [items[i] for i in rng.choice(len(items), candidates, replace=False)]
        started = time.monotonic()
        exact = AbuPlus(model, curvature, settings).score(query, chosen)
        middle = time.monotonic()
        linear = AbuPlusLinear(model, curvature, settings).score(query, chosen)
        ended = time.monotonic()
        other = AbuPlusLinear(model, curvature, replace(settings, seed=settings.seed + 1)).score(query, chosen)
        rank = lambda v: np.argsort(np.argsort(v))  # noqa: E731
        top = max(1, candidates // 10)
        rows.append(
            {
                "spearman": float(np.corrcoef(rank(exact.tau), rank(linear.tau))[0, 1]),
                "slope": float(np.polyfit(linear.tau, exact.tau, 1)[0]),
                "overlap_top_tenth": len(
                    set(exact.order()[:top].tolist()) & set(linear.order()[:top].tolist())
                ) / top,
                "spearman_other_noise": float(np.corrcoef(rank(linear.tau), rank(other.tau))[0, 1]),
                "exact_seconds": middle - started,
                "linear_seconds": ended - middle,
            }
        )  # fmt: skip
        log.info("agreement of query %d: %s", number, {k: round(v, 4) for k, v in rows[-1].items()})
    mean = {k: float(np.mean([r[k] for r in rows])) for k in rows[0]}
    out.parent.mkdir(parents=True, exist_ok=True)
    machine = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__}
    out.write_text(json.dumps({"mean": mean, "rows": rows, "candidates": candidates, "machine": machine}, indent=2))


def main() -> None:
    """Make the snapshot; see the module."""
    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=root / "data/openclipart/items.parquet")
    parser.add_argument("--model", type=Path, default=root / "data/generator")
    parser.add_argument("--out", type=Path, default=root / "data/labels")
    parser.add_argument("--reports", type=Path, default=root / "reports/labels")
    parser.add_argument("--work", type=Path, default=root / ".byline/labels", help="resumable intermediate files")
    parser.add_argument("--queries", type=int, default=320)
    parser.add_argument("--draws", type=int, default=128, help="(timestep, noise) draws per item")
    parser.add_argument("--query-draws", type=int, default=192)
    parser.add_argument("--agreement-queries", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only-agreement", action="store_true", help="measure on the snapshot that is there")
    a = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(a.processes)
    items, teacher_items = read_corpus(a.corpus)
    model = DiffusionModel.load(a.model)
    curvature = ensure_curvature(model, teacher_items, a.model / "curvature", seed=a.seed)
    settings = UnlearningSettings(
        corpus_size=len(items), query_draws=a.query_draws, item_draws=a.draws, seed=a.seed, noise="shared"
    )
    if a.only_agreement:
        chosen = [
            TeacherQuery(Image.open(io.BytesIO(q.image)).convert("RGB"), q.prompt)
            for q in read_snapshot(a.out)[1][: a.agreement_queries]
        ]
        measure_agreement(model, curvature, settings, teacher_items, chosen, 100, a.reports / "agreement.json")
        return
    work = a.work / f"{model.revision}-{settings.digest()}-{a.queries}"
    work.mkdir(parents=True, exist_ok=True)
    log.info("model %s, settings %s, %d items", model.revision, asdict(settings), len(items))

    planned = list(itertools.islice(plan_queries(items, a.seed), a.queries))
    pictures = model.generate(
        [q.prompt for q in planned], [q.seed for q in planned],
        progress=lambda done, total: log.info("generated %d of %d queries", done, total),
    )  # fmt: skip
    images = [encode_png(p) for p in pictures]

    context = multiprocessing.get_context("spawn")
    with context.Pool(a.processes, _start, (a.model, a.corpus, settings)) as pool:
        folder = work / "directions"
        layers = list(curvature.layers)
        if not (folder / "done").exists():
            folder.mkdir(exist_ok=True)
            directions = []
            for found in pool.imap(_directions, [(i, q.prompt) for i, q in zip(images, planned, strict=True)]):
                directions.append(found)
                if len(directions) % 20 == 0:
                    log.info("gradients of %d of %d queries", len(directions), len(planned))
            for name in layers:
                np.save(folder / f"{name}.npy", np.stack([d[name] for d in directions]))
            (folder / "done").touch()
        scores, written = work / "scores.npy", work / "written.npy"
        if not written.exists():
            np.lib.format.open_memmap(scores, "w+", np.float64, (len(items), settings.replicates, len(planned)))
            np.lib.format.open_memmap(written, "w+", bool, (len(items),))
        result, flags = (np.lib.format.open_memmap(p, "r+") for p in (scores, written))
        todo = [(s, folder) for s in range(0, len(items), CHUNK) if not flags[s : s + CHUNK].all()]
        started = time.monotonic()
        for done, (start, block) in enumerate(pool.imap_unordered(_score, todo), 1):
            result[start : start + CHUNK] = block
            flags[start : start + CHUNK] = True
            if done % 10 == 0 or done == len(todo):
                result.flush()
                flags.flush()
                rate = (time.monotonic() - started) / done
                log.info("items: %d of %d chunks, %.0fs left", done, len(todo), rate * (len(todo) - done))

    teacher = AbuPlusLinear(model, curvature, settings)
    ids = np.array([i.item_id for i in items], dtype=np.int64)
    queries = []
    for number, (query, image) in enumerate(zip(planned, images, strict=True)):
        ranking = summarise(result[:, :, number].T, ids, settings.item_draws, teacher.teacher_id, "corpus")
        queries.append(
            SnapshotQuery(
                prompt=query.prompt, seed=query.seed, split=query.split, source="corpus", candidate_set="corpus",
                near_duplicate_group=query.near_duplicate_group, draws=ranking.draws, image=image,
                item_ids=ranking.item_ids, tau=ranking.tau, standard_error=ranking.standard_error,
                tau_halves=ranking.tau_halves,
            )
        )  # fmt: skip
    made_by = (
        f"python data/labels/make.py --queries {a.queries} --draws {a.draws} --query-draws {a.query_draws} "
        f"--seed {a.seed}"
    )
    header = SnapshotHeader("openclipart", model.revision, "openclipart", teacher.teacher_id, made_by)
    write_snapshot(a.out, header, queries)
    log.info("wrote %d rankings of %d items to %s", len(queries), len(items), a.out)
    chosen = [TeacherQuery(pictures[i], planned[i].prompt) for i in range(a.agreement_queries)]
    if chosen:
        measure_agreement(model, curvature, settings, teacher_items, chosen, 100, a.reports / "agreement.json")


if __name__ == "__main__":
    main()
