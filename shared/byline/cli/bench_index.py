"""``make bench-index``: every index tier on real embeddings and on sketches; JSON and figure into ``reports/bench``.

Why it exists: ``byline.evaluation.bench_index`` does the measuring; here are the vectors it is done on and the sizes.

    python -m byline.cli.bench_index --fashion /usr/share/datasets/fashion-mnist --sizes 10000 100000

Fashion-MNIST is Debian's package dataset-fashion-mnist (30 MB); without it all rows are views of the corpus's own
images. Features are computed once and kept; a killed run goes on behind the last tier that was measured (``--fresh``
measures anew). Times are of one thread; run it on a quiet machine. A million rows take 15 GB of memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from byline.diffusion.model import directory_revision
from byline.evaluation.bench_index import TIERS, Plan, marked, measure_scans, measure_tier, one_thread
from byline.evaluation.bench_index_data import (
    ImageFeatures,
    Rows,
    Views,
    cosine_rows,
    product_rows,
    read_images,
    sketch_rows,
)
from byline.evaluation.bench_index_report import Row, draw, table
from byline.evaluation.bench_rows import RowFile
from byline.evaluation.result_file import git_commit, machine, write_result
from byline.teachers.sketch_set import SketchSet

log = logging.getLogger("bench-index")
ROOT = Path(__file__).resolve().parents[3]
SETS = ("cosine", "product", "sketch")
FASHION = Path("/usr/share/datasets/fashion-mnist")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write the result."""
    a = _parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    one_thread()
    fashion = a.fashion if a.fashion.is_dir() else None
    settings = {"dim": a.dim, "queries": a.queries, "timed": a.timed, "real": a.real_rows, "seed": a.seed,
                "fashion": fashion is not None, "side": 64}  # fmt: skip
    folder = a.out / f"index-{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]}"
    if a.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    steps = RowFile(folder)
    rows: list[Row] = []
    for name in a.sets:
        for size in a.sizes:
            rows += _measured(a, name, size, fashion, steps)
    found = marked([dict(row) for row in rows])
    path = a.out / "index.json"
    result = {"settings": settings | {"sizes": a.sizes, "threads": 1, "batch": 64}, "rows": found}
    given = list(sys.argv[1:] if argv is None else argv)
    command = "python -m byline.cli.bench_index " + " ".join(given) if given else "make bench-index"
    write_result(path, result, command=command, seconds=steps.seconds, commit=git_commit(ROOT), seed=a.seed)
    drawn = draw(found, path.with_suffix(".png"))
    print(table(found))
    print(f"\n{machine()}; CPU milliseconds of one thread; * is what a release of this size gets by default")
    log.info("wrote %s%s", path, "" if drawn else "; no figure, as matplotlib is not installed")


def _measured(a: argparse.Namespace, name: str, size: int, fashion: Path | None, steps: RowFile) -> list[Row]:
    """The rows of one set and size; the vectors are only made if a step is still to be measured."""
    made: list[Rows] = []

    def rows() -> Rows:
        if not made:
            made.append(_rows(a, name, size, fashion))
            log.info("%s: %s", name, made[0].what)
        return made[0]

    timed = max(40, min(a.timed, 20_000_000 // size))
    plan = Plan(timed, 5 if size <= 200_000 else 2, a.seed)
    found: list[Row] = list(steps.once(f"{name}-{size}-scans", lambda: (measure_scans(rows(), plan), {}))[0])
    for tier in a.tiers:
        if tier == "hnsw" and size > a.largest_graph:
            log.info("no graph of %d items: it takes many minutes to link (--largest-graph)", size)
            continue
        step = steps.once(f"{name}-{size}-{tier}", lambda tier=tier: ([measure_tier(rows(), tier, plan)], {}))[0]  # type: ignore[misc]
        log.info("%s %d %s: %s", name, size, tier, {k: step[0][k] for k in ("recall100", "p50_ms", "ratio_to_faiss")})
        found += step
    return found


def _rows(a: argparse.Namespace, name: str, size: int, fashion: Path | None) -> Rows:
    if name == "sketch":
        model = a.model
        return sketch_rows(model / "sketches", directory_revision(model), size, a.queries, a.seed)
    views = Views(read_images(a.corpus, fashion), a.seed)
    features = ImageFeatures(views, a.out / "index-features" / f"{a.seed}-{views.images}")

    def shown(done: int, total: int) -> None:
        if done % 10 == 0 or done == total:
            log.info("features: shard %d of %d", done, total)

    rows = cosine_rows(features, views.images, size, a.queries, a.dim, a.seed, a.real_rows, shown)
    if name == "cosine":
        return rows
    sketches = SketchSet.load(a.model / "sketches", directory_revision(a.model)).sketches.astype(np.float32)
    return product_rows(rows, np.linalg.norm(sketches, axis=1), a.seed)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--tiers", nargs="+", choices=TIERS, default=list(TIERS))
    parser.add_argument("--dim", type=int, default=768, help="of the cosine embeddings")
    parser.add_argument("--queries", type=int, default=400, help="half of them tune, half measure")
    parser.add_argument("--timed", type=int, default=200, help="queries asked one by one (fewer from 100,000 rows)")
    parser.add_argument("--real-rows", type=int, default=100_000, help="rows that are encoded; more are grown")
    parser.add_argument("--largest-graph", type=int, default=200_000)
    parser.add_argument("--fashion", type=Path, default=FASHION, help="folder of the IDX files")
    parser.add_argument("--corpus", type=Path, default=ROOT / "data/openclipart/items.parquet")
    parser.add_argument("--model", type=Path, default=ROOT / "data/generator", help="with its sketches/")
    parser.add_argument("--out", type=Path, default=ROOT / "reports/bench")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="forget the rows of an earlier run of this configuration")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
