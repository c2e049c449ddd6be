"""Peak memory of one form of the teacher, in a process of its own.

Why it exists: memory that one form has freed stays with the process, so forms measured one after the other would each
show the largest so far. Here each form runs in a fresh child on as many items as it keeps at a time (more change
nothing), and what the child held before, model and curvature loaded and the UNet warm, is taken off. Linux only.
"""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from byline.diffusion.model import DiffusionModel
from byline.evaluation.bench_clock import forwards_per_second
from byline.evaluation.published_teacher import PublishedSettings, PublishedTeacher
from byline.teachers.abu_plus import AbuPlus
from byline.teachers.curvature import Curvature
from byline.teachers.first_order import AbuPlusLinear
from byline.teachers.natural_gradient import UnlearningSettings
from byline.teachers.ranking import TeacherItem, TeacherQuery

Form = Literal["published", "exact", "first_order"]


@dataclass(frozen=True)
class MemoryTask:
    """One form on ``items`` and ``queries``; batch sizes as in the timed run."""

    form: Form
    model: Path
    factors: Path
    settings: UnlearningSettings
    published: PublishedSettings
    items: Sequence[TeacherItem]
    queries: Sequence[TeacherQuery]
    batch: int
    device: str = "cpu"


def peak_megabytes(task: MemoryTask) -> float:
    """Peak of ``task`` over the loaded model, in MiB, measured in a spawned child with one thread."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return float(pool.apply(_run, (task,)))


def _run(task: MemoryTask) -> float:
    torch.set_num_threads(1)
    model = DiffusionModel.load(task.model, task.device)
    curvature = Curvature.load(task.factors, model.revision).to(task.device)
    forwards_per_second(model, task.batch, 1)
    before = _begin(task.device)
    if task.form == "published":
        published = PublishedTeacher(model, task.factors, task.published)
        prepared = published.prepare(task.items)
        baselines = published.losses(*prepared)
        for query in task.queries:
            published.score(query, prepared, baselines, 1 / task.settings.corpus_size)
    elif task.form == "exact":
        AbuPlus(model, curvature, task.settings, task.batch).score_many(task.queries, task.items)
    else:
        AbuPlusLinear(model, curvature, task.settings, task.batch).score_many(task.queries, task.items)
    return _peak(task.device) - before


def _begin(device: str) -> float:
    """MiB held now; the peak counts from here."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (proc(5)); getrusage's peak cannot be reset
    return _status("VmRSS")


def _peak(device: str) -> float:
    """Largest MiB since ``_begin``: of the device's allocator on a GPU, of the process elsewhere."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return _status("VmHWM")


def _status(name: str) -> float:
    """A size from /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024
