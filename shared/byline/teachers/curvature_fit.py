"""Fitting EK-FAC: two stages of sums over draws from the corpus, in shards that resume.

Why it exists: no public code fits the factors of a diffusion model's denoising loss, and a fit takes
minutes to hours. Stage ``covariances`` sums a a^T and delta delta^T; their eigenvectors are the
basis; stage ``eigenvalues`` sums the squares of the per-sample gradients in that basis. Several
workers may take a shard each (``fit_shard``); ``fit_curvature`` does whatever is still missing.

A draw is (image, timestep, noise, output cotangent). F is the Fisher (Gauss-Newton) matrix of the
per-image *mean* squared error: output gradients are sampled as sqrt(2 / D) xi with xi standard
normal, whose second moment is the loss's exact Hessian 2 / D in the D outputs. With it a step of
1 / N means "one sample's worth" (reference/measured.md, C7.4).
"""

from __future__ import annotations

import hashlib
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file

from byline.diffusion.model import DiffusionModel
from byline.errors import TeacherNotUsable
from byline.teachers.curvature import Curvature, LayerFactors
from byline.teachers.layers import EditableLayer, capture, select_layers
from byline.teachers.noise import NoiseScheme
from byline.teachers.partial_sums import PartialSums, Sums, counting, merge, shard_draws
from byline.teachers.ranking import Check, Progress, ignore_progress, never_cancelled

Stage = Literal["covariances", "eigenvalues"]
#: layer -> inputs [batch, tokens, columns] and output gradients [batch, tokens, rows]
Gradients = tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]
#: layer -> (eigenvectors of A [columns, columns], eigenvectors of B [rows, rows])
Bases = dict[str, tuple[torch.Tensor, torch.Tensor]]
#: Per-sample gradients are made for as many samples at once as fit into this many numbers (256 MB).
CHUNK = 1 << 26


@dataclass(frozen=True)
class CurvatureFit:
    """One fit: what it is made from, and where its partial sums lie.

    ``latents`` [n, c, h, w] and ``states`` [n, tokens, dim] are the corpus; draw s uses image s mod n
    in an order given by ``seed``. ``directory`` (None: nothing survives the process) may be shared by
    the workers of one fit; ``batch`` and ``shards`` change the result in float rounding only.
    """

    model: DiffusionModel
    latents: torch.Tensor
    states: torch.Tensor
    selection: str
    samples: int
    seed: int
    batch: int = 64
    shards: int = 1
    directory: Path | None = None
    every: int = 512

    @cached_property
    def layers(self) -> dict[str, EditableLayer]:
        """The layers whose factors are fitted."""
        return select_layers(self.model.unet, self.selection)

    @cached_property
    def digest(self) -> str:
        """First 12 hex digits over everything that changes the sums; part of every file's name."""
        settings = (self.model.revision, self.selection, self.samples, self.seed, self.batch, self.shards)
        found = hashlib.sha256(repr(settings).encode())
        for tensor in (self.latents, self.states):
            found.update(repr(tuple(tensor.shape)).encode())
            found.update(tensor.detach().cpu().contiguous().numpy().data)
        return found.hexdigest()[:12]


def fit_curvature(
    model: DiffusionModel,
    latents: torch.Tensor,
    states: torch.Tensor,
    *,
    selection: str = "cross_attention_kv",
    samples: int,
    seed: int,
    batch: int = 64,
    directory: Path | None = None,
    shards: int = 1,
    progress: Progress = ignore_progress,
    check: Check = never_cancelled,
) -> Curvature:
    """Fit the factors on ``samples`` draws; see ``CurvatureFit`` for the arguments.

    With ``directory`` a killed fit goes on where it stood, bit-equal, and shards that other workers
    have finished are taken over. The caller saves the result and removes the directory.
    ``progress`` counts the draws of both stages; ``check`` is called before every batch and may raise.
    """
    fit = CurvatureFit(model, latents, states, selection, samples, seed, batch, shards, directory)

    def run(stage: Stage, offset: int, bases: Bases | None) -> Iterator[Sums]:
        for shard in range(shards):
            first = offset + shard_draws(samples, shards, shard).start
            report = counting(progress, first, 2 * samples)
            yield fit_shard(fit, stage, shard, bases=bases, progress=report, check=check)

    bases = publish_bases(fit, _decomposed(fit, merge(run("covariances", 0, None))))
    return finish(fit, bases, merge(run("eigenvalues", samples, bases)))


def fit_shard(
    fit: CurvatureFit,
    stage: Stage,
    shard: int,
    *,
    bases: Bases | None = None,
    progress: Progress = ignore_progress,
    check: Check = never_cancelled,
) -> Sums:
    """The sums of one shard of one stage: computed, or read where they are finished already.

    The stage ``eigenvalues`` needs ``bases``; without them they are made from the covariances of all
    shards in the fit's directory, or TeacherNotUsable names the shards that are missing.
    """
    add = _covariances_of(fit) if stage == "covariances" else _eigenvalues_of(fit, bases or merged_bases(fit))
    return _partial(fit, stage, shard).compute(add, progress, check)


def _covariances_of(fit: CurvatureFit) -> Callable[[range], Sums]:
    sharing = shared_inputs(fit)
    return lambda rows: covariance_sums(*_sampled_gradients(fit, rows), sharing)


def _eigenvalues_of(fit: CurvatureFit, bases: Bases) -> Callable[[range], Sums]:
    return lambda rows: eigenvalue_sums(*_sampled_gradients(fit, rows), bases)


def merged_bases(fit: CurvatureFit) -> Bases:
    """The eigenbases of all shards' covariances: the same ones for every worker of the fit."""
    path = _bases_path(fit)
    if path is not None and path.exists():
        return _read_bases(path, shared_inputs(fit), fit.model.device)
    return publish_bases(fit, _decomposed(fit, merge(_finished(fit, "covariances"))))


def merge_shards(fit: CurvatureFit) -> Curvature:
    """The curvature of a fit whose shards are all finished. TeacherNotUsable names those that are not."""
    bases = merged_bases(fit)
    return finish(fit, bases, merge(_finished(fit, "eigenvalues")))


# -- what is summed -----------------------------------------------------------------------------


def covariance_sums(
    inputs: Mapping[str, torch.Tensor], deltas: Mapping[str, torch.Tensor], activation_of: Mapping[str, str]
) -> Sums:
    """Sums over samples and tokens of a a^T (``activation/name``) and delta delta^T (``gradient/name``).

    ``inputs[name]`` [batch, tokens, columns], ``deltas[name]`` [batch, tokens, rows]. An input that
    several layers share is summed once, under the first one's name (``activation_of``).
    """
    sums: Sums = {}
    for name, delta in deltas.items():
        sums[f"gradient/{name}"] = gram(delta.flatten(0, 1))
        if activation_of[name] == name:
            sums[f"activation/{name}"] = gram(inputs[name].flatten(0, 1))
    return sums


def gram(rows: torch.Tensor) -> torch.Tensor:
    """rows^T rows, [n, d] to [d, d]: off-diagonal blocks once, which halves the work of wide patches."""
    width = rows.shape[1]
    if width < 512:
        return rows.T @ rows
    left, right = rows[:, : width // 2], rows[:, width // 2 :]
    corner = left.T @ right
    return torch.cat([torch.cat([gram(left), corner], dim=1), torch.cat([corner.T, gram(right)], dim=1)])


def eigenvalue_sums(inputs: Mapping[str, torch.Tensor], deltas: Mapping[str, torch.Tensor], bases: Bases) -> Sums:
    """Sums over samples of the squared per-sample gradients U_B^T G U_A, [rows, columns] per layer."""
    sums: Sums = {}
    for name, delta in deltas.items():
        activation, gradient = bases[name]
        rows, columns = gradient.shape[0], activation.shape[0]
        tokens = inputs[name]
        rotated = delta @ gradient
        # U_A goes onto the tokens or onto the gradient, whichever has fewer rows.
        tokens_first = tokens.shape[1] <= rows
        if tokens_first:
            tokens = tokens @ activation
        total = torch.zeros(rows, columns, device=delta.device)
        for part, part_tokens in per_sample_chunks(rotated, tokens):
            g = part.transpose(1, 2) @ part_tokens  # [batch, rows, columns]
            total += (g if tokens_first else g @ activation).square_().sum(0)
        sums[name] = total
    return sums


def per_sample_chunks(deltas: torch.Tensor, inputs: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A batch in parts whose per-sample gradients [part, rows, columns] fit into ``CHUNK`` numbers."""
    size = max(1, CHUNK // (deltas.shape[2] * inputs.shape[2]))
    return zip(deltas.split(size), inputs.split(size), strict=True)


def decompose(covariances: Sums, activation_of: Mapping[str, str]) -> Bases:
    """Eigenvectors of the summed covariances; layers of one input share one tensor. Scale does not matter."""
    owners = dict.fromkeys(activation_of.values())
    shared = {owner: eigenvectors(covariances[f"activation/{owner}"]) for owner in owners}
    return {n: (shared[owner], eigenvectors(covariances[f"gradient/{n}"])) for n, owner in activation_of.items()}


def eigenvectors(covariance: torch.Tensor) -> torch.Tensor:
    """Eigenvectors of a symmetric matrix, computed in float64 (as float32 they are not orthogonal enough)."""
    symmetric = (covariance + covariance.T).double() / 2
    vectors: torch.Tensor = torch.linalg.eigh(symmetric).eigenvectors.float()
    return vectors.contiguous()  # as a file gives them back: products differ in rounding by memory layout


def _decomposed(fit: CurvatureFit, covariances: Sums) -> Bases:
    """The bases of a fit's covariances, on the model's device: gradients are turned into them there."""
    return decompose({n: c.to(fit.model.device) for n, c in covariances.items()}, shared_inputs(fit))


def finish(fit: CurvatureFit, bases: Bases, sums: Sums) -> Curvature:
    """The curvature of these bases and summed eigenvalues."""
    factors = {
        name: LayerFactors(activation, gradient, (sums[name] / fit.samples).to(gradient))
        for name, (activation, gradient) in bases.items()
    }
    return Curvature(factors, fit.selection, fit.model.revision, fit.samples, fit.seed)


# -- draws --------------------------------------------------------------------------------------


def shared_inputs(fit: CurvatureFit) -> dict[str, str]:
    """For each layer, in the network's order, the first layer that reads the very same input.

    K and V of every cross-attention read the text, Q, K and V of a self-attention one hidden state,
    the time projections one embedding: one activation factor each. Found on the fit's first two
    draws, so every shard finds the same.
    """
    inputs, _ = _sampled_gradients(fit, range(min(2, fit.samples)))
    tensors = {name: inputs[name] for name in fit.layers}
    first: dict[str, str] = {}
    for name, value in tensors.items():
        twins = (
            other
            for other in dict.fromkeys(first.values())
            if tensors[other].shape == value.shape and torch.equal(tensors[other], value) and bool(value.any())
        )
        first[name] = next(twins, name)
    return first


def _sampled_gradients(fit: CurvatureFit, rows: range) -> Gradients:
    """Inputs and output gradients of the draws ``rows`` under sampled output cotangents."""
    model = fit.model
    latents, states, timesteps, noise, xi = _drawn(fit, rows, "curvature")
    with capture(fit.layers) as record:
        output = model.predict(model.add_noise(latents, noise, timesteps), timesteps, states)
        scale = (2 / output[0].numel()) ** 0.5
        return record.inputs, record.gradients((output * xi * scale).flatten(1).sum(1))


def denoising_gradients(fit: CurvatureFit, rows: range) -> Gradients:
    """Inputs and output gradients of the draws ``rows`` under their own denoising losses."""
    latents, states, timesteps, noise, _ = _drawn(fit, rows, "fisher")
    with capture(fit.layers) as record:
        return record.inputs, record.gradients(fit.model.denoising_loss(latents, states, timesteps, noise))


def _drawn(fit: CurvatureFit, rows: range, key: str) -> tuple[torch.Tensor, ...]:
    """Latents, states, timesteps, noise and cotangents of the draws ``rows``, each [rows, ...]."""
    device = fit.model.device
    order = torch.randperm(len(fit.latents), generator=torch.Generator().manual_seed(fit.seed))
    chosen = order[torch.tensor(rows) % len(fit.latents)]
    drawn = [draw(fit.seed, row, fit.samples, fit.model, key) for row in rows]
    timesteps = torch.tensor([timestep for timestep, _, _ in drawn])
    noise, xi = torch.stack([noise for _, noise, _ in drawn]), torch.stack([xi for _, _, xi in drawn])
    return tuple(t.to(device) for t in (fit.latents[chosen], fit.states[chosen], timesteps, noise, xi))


def draw(
    seed: int, index: int, samples: int, model: DiffusionModel, key: str = "curvature"
) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Timestep, noise and output cotangent of one fitting draw.

    Draw indices are spread over the timestep strata by a multiplicative step, since consecutive
    draws otherwise share a timestep, and with it an epoch would see each image at one noise level.
    """
    scheme = NoiseScheme("item", seed, samples, 1)
    stratum = (index * _coprime(samples)) % samples
    timesteps, pair = scheme.draw(key, [stratum], (2, *model.latent_shape), model.num_timesteps)
    return int(timesteps[0]), pair[0, 0], pair[0, 1]


def _coprime(n: int) -> int:
    """A step near the golden section of n that visits every residue."""
    step = max(1, int(n * 0.618))
    while math.gcd(step, n) != 1:
        step += 1
    return step


# -- files --------------------------------------------------------------------------------------


def _partial(fit: CurvatureFit, stage: Stage, shard: int) -> PartialSums:
    draws = shard_draws(fit.samples, fit.shards, shard)
    if fit.directory is None:
        return PartialSums(draws, fit.batch)
    # Eigenvalues are in a basis that the covariances of this digest decide, so one digest names both.
    name = f"{stage}-{shard}-of-{fit.shards}-{fit.digest}.safetensors"
    return PartialSums(draws, fit.batch, fit.directory / name, fit.every)


def _finished(fit: CurvatureFit, stage: Stage) -> Iterator[Sums]:
    """The sums of every shard, in order, from the fit's directory."""
    missing = []
    for shard in range(fit.shards):
        sums = _partial(fit, stage, shard).finished()
        if sums is None:
            missing.append(shard)
        elif not missing:
            yield sums
    if missing:
        raise TeacherNotUsable(f"{stage} of shards {missing} of {fit.shards} are not finished in {fit.directory}")


def _bases_path(fit: CurvatureFit) -> Path | None:
    return None if fit.directory is None else fit.directory / f"bases-{fit.digest}.safetensors"


def publish_bases(fit: CurvatureFit, bases: Bases) -> Bases:
    """``bases``, or those another worker of the fit has published first: all must use the same. On its device."""
    path = _bases_path(fit)
    if path is None:
        return bases
    activation_of = shared_inputs(fit)
    tensors = {f"gradient/{name}": gradient for name, (_, gradient) in bases.items()}
    tensors |= {f"activation/{owner}": bases[owner][0] for owner in activation_of.values()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, temporary)
    try:
        os.link(temporary, path)  # fails where a rename would replace
    except FileExistsError:
        pass
    finally:
        temporary.unlink()
    return _read_bases(path, activation_of, fit.model.device)


def _read_bases(path: Path, activation_of: Mapping[str, str], device: str) -> Bases:
    # Cloned: aligned as fresh ones are.
    loaded = {name: tensor.clone().to(device) for name, tensor in load_file(path).items()}
    return {name: (loaded[f"activation/{owner}"], loaded[f"gradient/{name}"]) for name, owner in activation_of.items()}
