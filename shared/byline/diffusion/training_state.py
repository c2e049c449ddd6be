"""Checkpoints from which a killed training run continues as if nothing had happened.

Why it exists: the demo generator needs about an hour and a half on two cores, and a laptop sleeps
or a session ends in between. Everything is safetensors and JSON, so a checkpoint can be shared
without running code; the file is replaced atomically, so a kill in mid-write keeps the last one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def save_state(
    path: Path,
    step: int,
    module: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    average: dict[str, torch.Tensor],
    seconds: float,
) -> None:
    """Write weights, optimiser moments and the running average of ``step`` atomically."""
    tensors = {f"module.{k}": v.detach().contiguous() for k, v in module.state_dict().items()}
    tensors |= {f"average.{k}": v.contiguous() for k, v in average.items()}
    state = optimiser.state_dict()["state"]
    for index, moments in state.items():
        tensors |= {f"optimiser.{index}.{k}": v.contiguous() for k, v in moments.items()}
    meta = {"step": str(step), "seconds": json.dumps(seconds)}
    partial = path.with_suffix(".partial")
    save_file({k: v.clone() for k, v in tensors.items()}, partial, metadata=meta)
    os.replace(partial, path)


def load_state(
    path: Path,
    module: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    average: dict[str, torch.Tensor],
) -> tuple[int, float]:
    """Restore what ``save_state`` wrote, in place; return (step, seconds spent so far)."""
    weights: dict[str, torch.Tensor] = {}
    moments: dict[int, dict[str, torch.Tensor]] = {}
    with safe_open(path, framework="pt") as handle:
        meta = handle.metadata()
        for key in handle.keys():
            kind, rest = key.split(".", 1)
            if kind == "module":
                weights[rest] = handle.get_tensor(key)
            elif kind == "average":
                average[rest] = handle.get_tensor(key)
            else:
                index, name = rest.split(".", 1)
                moments.setdefault(int(index), {})[name] = handle.get_tensor(key)
    module.load_state_dict(weights)
    state = optimiser.state_dict()
    state["state"] = moments
    optimiser.load_state_dict(state)
    return int(meta["step"]), float(json.loads(meta["seconds"]))
