"""Sums over many draws that survive a kill, and that several workers can share.

Why it exists: every Fisher approximation is a mean over thousands of independent draws. Cut into
shards, any number of workers can take one each; kept as plain sums, a shard goes on after a kill
exactly where it stood, and the merge of all of them is an addition in a fixed order.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from byline.errors import TeacherNotUsable
from byline.teachers.ranking import Check, Progress

#: name -> float64 tensor: what a batch of draws adds.
Sums = dict[str, torch.Tensor]


def shard_draws(draws: int, shards: int, shard: int) -> range:
    """The contiguous draws of one of ``shards`` nearly equal parts."""
    if not 0 <= shard < shards <= draws:
        raise TeacherNotUsable(f"shard {shard} of {shards} over {draws} draws: choose 0 <= shard < shards <= draws")
    return range(draws * shard // shards, draws * (shard + 1) // shards)


@dataclass(frozen=True)
class PartialSums:
    """The sums of one shard over its draws, in memory or, with ``path``, in a safetensors file.

    The file says how many draws it holds, and is replaced atomically every ``every`` draws, so that a
    kill costs at most that many. Batches start at the shard's first draw whether or not it was
    interrupted: the sums of a resumed run are bit-equal to those of an uninterrupted one.
    """

    draws: range
    batch: int
    path: Path | None = None
    every: int = 512

    def compute(self, add: Callable[[range], Mapping[str, torch.Tensor]], progress: Progress, check: Check) -> Sums:
        """All sums, on the CPU; ``add`` gives those of the draws it is handed. Raises what ``check`` raises.

        They are added up on the device that ``add`` gives them on, whatever a file has them on. ``progress`` is called
        with (draws done, draws of this shard).
        """
        sums, done = self._read()
        written = done
        step = max(1, self.every // self.batch) * self.batch
        while done < len(self.draws):
            check()
            rows = self.draws[done : done + self.batch]
            for name, value in add(rows).items():
                before = sums.get(name)
                sums[name] = value.double() if before is None else before.to(value.device).add_(value)
            done += len(rows)
            if done - written >= step or done == len(self.draws):
                self._write(sums, done)
                written = done
            progress(done, len(self.draws))
        # As ``finished`` has them: a merge adds shards that were computed here to those that were read.
        return {name: value.cpu() for name, value in sums.items()}

    def finished(self) -> Sums | None:
        """The sums in the file if it holds all draws, else None."""
        sums, done = self._read()
        return sums if done == len(self.draws) else None

    def _read(self) -> tuple[Sums, int]:
        if self.path is None or not self.path.exists():
            return {}, 0
        with safe_open(self.path, framework="pt") as file:
            metadata = file.metadata()
            if (int(metadata["first"]), int(metadata["last"])) != (self.draws.start, self.draws.stop):
                raise TeacherNotUsable(f"{self.path} holds sums over other draws: remove it to start anew")
            return {name: file.get_tensor(name) for name in file.keys()}, int(metadata["done"])  # noqa: SIM118

    def _write(self, sums: Sums, done: int) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"first": str(self.draws.start), "last": str(self.draws.stop), "done": str(done)}
        temporary = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}")
        save_file({name: value.cpu().contiguous() for name, value in sums.items()}, temporary, metadata)
        temporary.replace(self.path)


def merge(parts: Iterable[Sums]) -> Sums:
    """The sum of all parts, added in the order given."""
    total: Sums = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total[name] + value if name in total else value
    return total


def counting(progress: Progress, first: int, total: int) -> Progress:
    """A Progress over one shard that reports to ``progress`` as draws ``first`` onwards of ``total``."""
    return lambda done, _of: progress(first + done, total)
