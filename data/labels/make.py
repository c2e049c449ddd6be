"""Make the demo's label snapshot and its sketches: rank the whole corpus for several hundred generated queries.

Why it exists: the demo must not begin by waiting for the teacher. This is the curation service's
own plan and the first-order teacher (all queries, whole corpus, one pass of gradients), run once,
resumable, reproducible from its seed. The sketches of tier ESTIMATED come out of the same pass.
How far to trust it: ``byline evaluate teacher``, ``byline evaluate lds`` and docs/teacher.md.

    python data/labels/make.py

Writes ``data/labels/labels.{json,safetensors}`` and ``data/generator/{curvature,sketches,gradient}``.
"""

from __future__ import annotations

import argparse
import io
import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from byline.catalog.decode import encode_png
from byline.catalog.items import Item
from byline.diffusion.model import DiffusionModel
from byline.evaluation.corpus_file import read_corpus
from byline.features.gradient import fit_gradient_feature
from byline.rankings.snapshot import SnapshotHeader, SnapshotQuery, write_snapshot
from byline.teachers import TeacherQuery
from byline.teachers.first_order import AbuPlusLinear
from byline.teachers.item_gradients import GradientBlock
from byline.teachers.natural_gradient import UnlearningSettings
from byline.teachers.ranking import summarise, with_query_noise
from byline.teachers.registry import ensure_curvature
from byline.teachers.row_store import RowStore, digest_of
from byline.teachers.sketch_fit import fit_sketches
from services.curation.plan import plan_queries

log = logging.getLogger("labels")


def read_items(path: Path) -> list[Item]:
    """The corpus as catalogue items."""
    rows = pq.read_table(path).to_pylist()
    return [
        Item(
            item_id=r["item_id"], caption=r["caption"], keywords=tuple(r["keywords"]), creator=r["creator"],
            licence=r["licence"], source=r["source"], source_path=r["source_path"], image_sha256=r["sha256"],
            near_duplicate_group=r["near_duplicate_group"],
        )
        for r in rows
    ]  # fmt: skip


def gradient_halves(
    teacher: AbuPlusLinear, queries: list[TeacherQuery], work: Path, group: int = 20
) -> dict[str, torch.Tensor]:
    """Natural-gradient directions from two disjoint halves of each query's draws, per layer [2 q, rows, columns].

    Kept on disk query group by query group, so that a killed run goes on.
    """
    work.mkdir(parents=True, exist_ok=True)
    parts = []
    for start in range(0, len(queries), group):
        path = work / f"{start:05d}.safetensors"
        if not path.exists():
            found = teacher.direction_halves(queries[start : start + group])
            partial = path.with_suffix(".partial")
            save_file({n: h.contiguous() for n, h in found.items()}, partial)
            partial.replace(path)
            log.info("gradients of %d of %d queries", min(start + group, len(queries)), len(queries))
        parts.append(load_file(path))
    return {n: torch.cat([p[n] for p in parts], dim=1).flatten(0, 1) for n in parts[0]}


def main() -> None:
    """Make the snapshot and the sketches; see the module."""
    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=root / "data/openclipart/items.parquet")
    parser.add_argument("--model", type=Path, default=root / "data/generator")
    parser.add_argument("--out", type=Path, default=root / "data/labels")
    parser.add_argument("--work", type=Path, default=root / ".byline/labels", help="resumable intermediate files")
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument("--draws", type=int, default=64, help="(timestep, noise) draws per item")
    parser.add_argument("--query-draws", type=int, default=128)
    parser.add_argument("--damping", type=float, default=0.1)
    parser.add_argument("--objective", choices=("denoising", "output_norm"), default="output_norm")
    parser.add_argument("--dimensions", type=int, default=128, help="of a sketch, beside the token gradients")
    parser.add_argument("--feature-dimensions", type=int, default=768, help="of the encoder `gradient`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(a.threads)
    items = read_items(a.corpus)
    teacher_items = read_corpus(a.corpus)
    model = DiffusionModel.load(a.model)
    curvature = ensure_curvature(model, teacher_items, a.model / "curvature", seed=a.seed)
    settings = UnlearningSettings(
        corpus_size=len(items), query_draws=a.query_draws, item_draws=a.draws, damping=a.damping, seed=a.seed,
        noise="shared", objective=a.objective,
    )  # fmt: skip
    teacher = AbuPlusLinear(model, curvature, settings)
    work = a.work / f"{model.revision}-{settings.digest()}-{a.queries}"
    work.mkdir(parents=True, exist_ok=True)
    log.info("model %s, settings %s, %d items", model.revision, asdict(settings), len(items))

    planned = list(itertools.islice(plan_queries(items, a.seed), a.queries))
    pictures = model.generate(
        [q.prompt for q in planned], [q.seed for q in planned],
        progress=lambda done, total: log.info("generated %d of %d queries", done, total),
    )  # fmt: skip
    # As they will be read again: eight bits a channel.
    images = [encode_png(p) for p in pictures]
    queries = [
        TeacherQuery(Image.open(io.BytesIO(i)).convert("RGB"), q.prompt) for i, q in zip(images, planned, strict=True)
    ]
    directions = gradient_halves(teacher, queries, work / "directions")
    met = {name: d.flatten(1).T.contiguous() for name, d in directions.items()}  # [rows * columns, 2 q]
    shape = (len(items), settings.replicates, 2 * len(planned))
    scores = RowStore.open(
        work / "scores.npy", shape, np.float64, digest_of(teacher.teacher_id, teacher_items, directions)
    )

    def score(places: NDArray[np.int64], blocks: Sequence[GradientBlock]) -> None:
        [block] = blocks
        tau = torch.zeros(block.count, *shape[1:], dtype=torch.float64)
        for name in block.names:
            tau += (block.replicate_gradients(name).flatten(2) @ met[name]).double()
        scores.put(slice(int(places[0]), int(places[-1]) + 1), (tau / settings.corpus_size).numpy())

    started = time.monotonic()

    def progress(done: int, total: int) -> None:
        spent = time.monotonic() - started
        log.info("items: %d of %d, %.0f s left", done, total, spent / done * (total - done))

    held_out = [q for q, p in zip(queries, planned, strict=True) if p.split == "test"][:20]
    sketches = fit_sketches(
        teacher, teacher_items, dimensions=a.dimensions, basis_items=len(items), fidelity_queries=held_out,
        store=work / "sketches", seed=a.seed, visit=score, progress=progress,
    )  # fmt: skip
    if not scores.written.all():
        raise SystemExit(f"{work} holds sketches without scores: remove it and start anew")
    sketches.save(a.model / "sketches")
    log.info("sketches: %s", sketches.fidelity)
    if sketches.tokens is not None:
        truth = sketches.tokens.scores(sketches.tokens.basis.directions(teacher.directions(held_out)))
        folder = a.model / "gradient"
        found = fit_gradient_feature(
            teacher, sketches.tokens, held_out, truth, folder, dimensions=a.feature_dimensions, seed=a.seed
        )
        log.info("gradient feature: %s", found)

    ids = np.array([i.item_id for i in items], dtype=np.int64)
    labelled = []
    for number, (query, image) in enumerate(zip(planned, images, strict=True)):
        halves = np.stack([scores.rows[:, :, h * len(planned) + number].T for h in (0, 1)])  # [2, r, n]
        ranking = with_query_noise(
            summarise(halves.mean(0), ids, settings.item_draws, teacher.teacher_id, "corpus"), halves
        )
        labelled.append(
            SnapshotQuery(
                prompt=query.prompt, seed=query.seed, split=query.split, source="corpus", candidate_set="corpus",
                near_duplicate_group=query.near_duplicate_group, draws=ranking.draws, image=image,
                item_ids=ranking.item_ids, tau=ranking.tau, standard_error=ranking.standard_error,
                tau_halves=ranking.tau_halves, samples=ranking.samples,
            )
        )  # fmt: skip
    made_by = (
        f"python data/labels/make.py --queries {a.queries} --draws {a.draws} --query-draws {a.query_draws} "
        f"--damping {a.damping} --objective {a.objective} --seed {a.seed}"
    )
    header = SnapshotHeader("openclipart", model.revision, "openclipart", teacher.teacher_id, made_by)
    write_snapshot(a.out, header, labelled)
    log.info("wrote %d rankings of %d items to %s", len(labelled), len(items), a.out)


if __name__ == "__main__":
    main()
