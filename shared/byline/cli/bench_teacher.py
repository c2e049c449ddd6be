"""``make bench-teacher``: the published unlearning teacher beside ours; JSON and figure into ``reports/bench``.

Why it exists: ``byline.evaluation.bench_teacher`` does the measuring; here are the files it is done on: the corpus,
the model with its curvature, and the generated queries of the label snapshot.

    python -m byline.cli.bench_teacher --size default

A killed run goes on where it was (``--fresh`` begins anew). Run it on a quiet core with one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import logging
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from byline.diffusion.model import DiffusionModel
from byline.evaluation.bench_memory import Form, MemoryTask, peak_megabytes
from byline.evaluation.bench_plan import SIZES, Bench, BenchSize, Findings
from byline.evaluation.bench_rows import RowFile, Step
from byline.evaluation.bench_teacher import (
    choose,
    measure_budgets,
    measure_many,
    measure_published,
    measure_reference,
    measure_single,
    measure_sketches,
)
from byline.evaluation.bench_teacher_report import draw, figures
from byline.evaluation.corpus_file import read_corpus
from byline.evaluation.result_file import git_commit, write_result
from byline.rankings.snapshot import read_snapshot
from byline.teachers.curvature import Curvature
from byline.teachers.files import is_fitted
from byline.teachers.natural_gradient import UnlearningSettings
from byline.teachers.ranking import TeacherQuery

log = logging.getLogger("bench-teacher")
ROOT = Path(__file__).resolve().parents[3]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write the result."""
    a = _parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(a.threads)
    model = DiffusionModel.load(a.model, a.device)
    items = read_corpus(a.corpus)
    snapshot = read_snapshot(a.labels)[1]
    shuffle = np.random.default_rng(a.seed)
    size = _size(a)
    chosen = [items[i] for i in shuffle.permutation(len(items))[: max(size.corpus_sizes)]]
    asked = [snapshot[i] for i in shuffle.permutation(len(snapshot))[: max(size.query_counts)]]
    queries = [TeacherQuery(Image.open(io.BytesIO(q.image)).convert("RGB"), q.prompt) for q in asked]
    settings = {"size": asdict(size), "model": model.revision, "seed": a.seed, "batch": a.batch,
                "antithetic": a.antithetic, "bfloat16": a.bfloat16, "images_per_batch": a.images_per_batch,
                "threads": a.threads, "device": a.device}  # fmt: skip
    # What is measured once, the reference and the published form, decides the folder; the rest names its steps.
    later = {"antithetic", "bfloat16", "corpus_sizes", "query_counts", "growth_items", "single_queries",
             "sketch_draws", "sketch_dimensions", "memory_items"}  # fmt: skip
    common = {name: value for name, value in (settings | asdict(size)).items() if name not in later | {"size"}}
    identity = hashlib.sha256(json.dumps(common, sort_keys=True).encode())
    for item in chosen[: size.agreement_items]:
        identity.update(f"\0{item.item_id}".encode())
    for query in asked[: size.agreement_queries]:
        identity.update(f"\0{query.prompt}\0".encode() + query.image)
    digest = identity.hexdigest()[:8]
    folder = a.out / f"teacher-{digest}"
    sketches = a.model / "sketches"
    if a.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    log.info("steps are kept in %s", folder)
    bench = Bench(
        model, Curvature.load(a.model / "curvature", model.revision).to(model.device), a.model / "curvature", chosen,
        queries, len(items), size, RowFile(folder), a.seed, a.batch, a.antithetic, a.bfloat16, a.images_per_batch,
        sketches if is_fitted(sketches, model.revision) else None,
    )  # fmt: skip
    result = measure(bench) | {"settings": settings}
    path = a.out / "teacher.json"
    write_result(
        path, result, command="make bench-teacher" if argv is None and len(sys.argv) == 1 else _command(a),
        seconds=bench.rows.seconds, commit=git_commit(ROOT), seed=a.seed,
    )  # fmt: skip
    drawn = draw(result, path.with_suffix(".png"))
    log.info("wrote %s%s", path, "" if drawn else "; no figure, as matplotlib is not installed")


def measure(bench: Bench) -> dict[str, object]:
    """All steps, and the figures of the result file."""
    findings = Findings()
    reference, other = measure_reference(bench)
    measure_published(bench, reference, findings)
    whole = measure_budgets(bench, reference, other, findings)
    choose(bench, findings)
    measure_many(bench, reference, findings)
    measure_single(bench, reference, whole[bench.ours.query_draws], other, findings)
    measure_sketches(bench, reference, findings)
    peaks = measure_memory(bench)
    result = figures(findings, bench.corpus_size)
    return result | findings.figures | {"peak_memory_mb": peaks}


def measure_memory(bench: Bench) -> dict[str, float]:
    """Peak memory of each form over the loaded model, MiB, each in a child of its own; none for no ``memory_items``."""
    if not bench.size.memory_items:
        return {}
    count, few = bench.size.memory_items, bench.size.query_counts[-1]
    small = replace(bench.ours, query_draws=16, item_draws=16)
    published = replace(bench.published, query_draws=bench.batch)
    cases: dict[str, tuple[Form, int, UnlearningSettings]] = {
        "published": ("published", 1, small), "exact": ("exact", 1, replace(small, query_draws=bench.batch)),
        "first_order_1_query": ("first_order", 1, replace(small, query_draws=bench.batch)),
        f"first_order_{few}_queries": ("first_order", few, small),
    }  # fmt: skip

    def work() -> Step:
        rows: list[dict[str, Any]] = []
        for name, (form, queries, settings) in cases.items():
            task = MemoryTask(
                form, bench.model.directory, bench.factors, settings, published, bench.items[:count],
                bench.queries[:queries], bench.batch, bench.model.device,
            )  # fmt: skip
            rows.append({"form": name, "peak_memory_mb": round(peak_megabytes(task), 1)})
        return rows, {}

    rows, _ = bench.run(f"memory-{count}-{few}", work)
    return {row["form"]: row["peak_memory_mb"] for row in rows}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="default")
    parser.add_argument("--corpus", type=Path, default=ROOT / "data/openclipart/items.parquet")
    parser.add_argument("--model", type=Path, default=ROOT / "data/generator", help="with its curvature/")
    parser.add_argument("--labels", type=Path, default=ROOT / "data/labels", help="the queries come from here")
    parser.add_argument("--out", type=Path, default=ROOT / "reports/bench")
    parser.add_argument("--corpus-sizes", type=int, nargs="+")
    parser.add_argument("--query-counts", type=int, nargs="+")
    parser.add_argument("--batch", type=int, default=128, help="samples in a pass through the UNet")
    parser.add_argument("--images-per-batch", type=int, default=2, help="the published form's; decides its noise")
    parser.add_argument("--antithetic", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--bfloat16", action="store_true", help="autocast in our first-order passes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="forget the steps of an earlier run of this configuration")
    return parser.parse_args(argv)


def _size(a: argparse.Namespace) -> BenchSize:
    size = SIZES[a.size]
    return replace(
        size, corpus_sizes=tuple(a.corpus_sizes or size.corpus_sizes),
        query_counts=tuple(a.query_counts or size.query_counts),
    )  # fmt: skip


def _command(a: argparse.Namespace) -> str:
    return "python -m byline.cli.bench_teacher " + " ".join(sys.argv[1:] or [f"--size {a.size}"])


if __name__ == "__main__":
    main()
