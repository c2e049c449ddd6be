"""What a piece of work cost: CPU seconds, wall seconds, and how much of both the UNet had.

Why it exists: forms of the teacher are compared by ratios of seconds on machines that do other things as well, so the
clock is the process's own CPU time (on a GPU the wall, after the device has finished), and beside the seconds stand the
numbers of forward and backward evaluations, which no neighbour disturbs. The UNet's share shows where time goes that a
faster UNet would not save.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from byline.diffusion.model import DiffusionModel


@dataclass
class Cost:
    """``seconds`` of CPU (GPU: wall), ``wall`` seconds, ``unet`` seconds of them, and samples through the UNet."""

    seconds: float = 0.0
    wall: float = 0.0
    unet: float = 0.0
    forwards: int = 0
    backwards: int = 0
    marks: dict[str, float] = field(default_factory=dict)
    _started: float = 0.0
    _cuda: bool = False

    def now(self) -> float:
        """Seconds since the measurement began."""
        return clock(self._cuda) - self._started

    def mark(self, name: str) -> None:
        """Keep ``now`` under a name."""
        self.marks[name] = self.now()

    def row(self) -> dict[str, float]:
        """As it stands in a result file."""
        share = self.unet / self.seconds if self.seconds > 0 else 0.0
        return {
            "seconds": self.seconds, "wall_seconds": self.wall, "unet_share": round(share, 4),
            "forwards": self.forwards, "backwards": self.backwards,
        }  # fmt: skip


def clock(cuda: bool) -> float:
    """CPU seconds of this process; with ``cuda`` the wall, once the device has done what it was given."""
    if cuda:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


@contextmanager
def measured(model: DiffusionModel) -> Iterator[Cost]:
    """Measure what happens inside; complete when the context has closed.

    Forward passes are seen by hooks on the UNet, backward passes as calls of ``torch.autograd.grad``, which every
    teacher uses and which here ends in the UNet: in this context a function that looks at the clock stands in for it.
    """
    cuda = torch.device(model.device).type == "cuda"
    cost = Cost(_cuda=cuda)
    entered = 0.0
    rows = 0

    def before(_module: Any, inputs: tuple[Any, ...]) -> None:
        nonlocal entered, rows
        rows = inputs[0].shape[0]
        entered = clock(cuda)

    def after(_module: Any, _inputs: Any, _output: Any) -> None:
        cost.unet += clock(cuda) - entered
        cost.forwards += rows

    gradient = torch.autograd.grad

    def timed(*arguments: Any, **options: Any) -> Any:
        started = clock(cuda)
        found = gradient(*arguments, **options)
        cost.unet += clock(cuda) - started
        cost.backwards += rows
        return found

    handles = [model.unet.register_forward_pre_hook(before), model.unet.register_forward_hook(after)]
    torch.autograd.grad = timed
    wall = time.perf_counter()
    cost._started = clock(cuda)
    try:
        yield cost
    finally:
        cost.seconds = cost.now()
        cost.wall = time.perf_counter() - wall
        torch.autograd.grad = gradient
        for handle in handles:
            handle.remove()


@torch.no_grad()
def forwards_per_second(model: DiffusionModel, batch: int = 128, calls: int = 4) -> float:
    """Plain forward evaluations a second, now: the yardstick that says how fast the machine was around a row."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, *model.latent_shape, generator=generator).to(model.device)
    timesteps = torch.randint(0, model.num_timesteps, (batch,), generator=generator).to(model.device)
    states = model.encode_prompts([""]).expand(batch, -1, -1)
    cuda = torch.device(model.device).type == "cuda"
    model.predict(latents, timesteps, states)
    started = clock(cuda)
    for _ in range(calls):
        model.predict(latents, timesteps, states)
    return batch * calls / max(clock(cuda) - started, 1e-9)
