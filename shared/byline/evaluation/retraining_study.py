"""A study: a small generator whose training can be repeated dozens of times, and the pictures it is asked about.

Why it exists: whether a teacher names the images that matter is decided by training again without them. That needs a
corpus, a generator and a training run so small that a retraining takes a minute or two, fixed once and shared by
everything that is judged: subset of the corpus, frozen encodings, base model (a diffusers directory that teachers and
``DiffusionModel.load`` take as any other), queries drawn from it, and the noise its losses are measured with.

The first weights of every run are the same and know how to draw, but nothing of the subject: they were trained on the
drawings of *other* themes. A run on the subset then takes a minute, ends near the others (from random weights the
accident of each run hides the effect of a few images), and all it knows of flags or fruit it has from the subset.

What is kept: near-duplicate groups enter the subset whole. A prompt then has several plausible sources, as in the
full corpus, and removing a single one of them cannot change much: every method is judged under the same handicap.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from byline.diffusion.fit_denoiser import Recipe, TrainingSet, train
from byline.diffusion.model import DiffusionModel, directory_revision
from byline.errors import LabelsNotUsable
from byline.evaluation.corpus_file import read_corpus
from byline.teachers.noise import NoiseScheme
from byline.teachers.ranking import TeacherItem, TeacherQuery

Progress = Callable[[int, int], None]

#: What is in none of the study's themes.
OUTSIDE = "-"
#: Folders of the demo corpus whose pictures a small generator can learn to draw from their captions.
RICH_THEMES = (
    "signs_and_symbols/flags", "recreation/games/cards", "food/fruit", "food/desserts", "food/beverages",
    "animals/mammals", "animals/birds", "animals/bugs", "recreation/music", "transportation", "buildings/homes",
    "plants/flowers",
)  # fmt: skip


@dataclass(frozen=True)
class StudySettings:
    """Everything that decides what a retraining gives (``training``), and what is asked of it.

    ``themes`` empty: the whole corpus is drawn from.
    ``channels`` are the UNet's; the rest of its configuration is the source model's. ``pretraining_steps`` on all
    items outside of the themes make the first weights (0: random ones), shared by the base model and every retraining;
    order, noise and dropout have the retraining's own seed. ``loss_draws`` stratified (timestep, noise) pairs measure
    a query's loss.
    """

    items: int = 640
    themes: tuple[str, ...] = RICH_THEMES
    channels: tuple[int, ...] = (32, 64)
    norm_groups: int = 8
    pretraining_steps: int = 3000
    steps: int = 700
    batch: int = 32
    rate: float = 1.5e-3
    warm_up: int = 50
    decay: float = 0.5
    queries: int = 30
    candidates: int = 10
    guidance: float = 2.5
    sampling_steps: int = 50
    loss_draws: int = 200
    seed: int = 0

    def training(self) -> dict[str, Any]:
        """The part that weights depend on; queries may be chosen anew without training again."""
        asked = ("queries", "candidates", "guidance", "sampling_steps", "loss_draws")
        return {name: value for name, value in asdict(self).items() if name not in asked}

    def recipe(self, seed: int) -> Recipe:
        """The training run of one seed."""
        return Recipe(self.steps, self.batch, self.rate, seed, warm_up=self.warm_up, decay=self.decay, bf16=False)


#: ``cpu`` gives an answer in about two hours of two cores; ``fuller`` wants a GPU; ``tiny`` is for tests.
SIZES = {
    "cpu": StudySettings(),
    "fuller": StudySettings(items=2509, themes=(), channels=(64, 128), norm_groups=16,
                            pretraining_steps=0, steps=4000, batch=128, rate=1e-3, warm_up=500, decay=0.2,
                            queries=100, guidance=3.0),
    "tiny": StudySettings(items=24, themes=(), channels=(8, 8), norm_groups=4, pretraining_steps=0, steps=4, batch=8,
                          rate=1e-3, warm_up=1, queries=4,
                          candidates=2, sampling_steps=2, loss_draws=8),
}  # fmt: skip


def choose_items(
    source_paths: list[str], groups: list[int], themes: tuple[str, ...], count: int, seed: int
) -> list[int]:
    """Rows of a subset of about ``count`` items, in file order: whole groups, drawn from each theme in turn.

    Drawing in turn keeps a large theme (flags) from filling the subset. A group belongs to the theme of its first row.
    """
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    piles: list[list[list[int]]] = []
    rng = np.random.default_rng(seed)
    for theme in themes or ("",):
        of_theme = [
            rows for rows in members.values()
            if _theme_of(source_paths[rows[0]], themes) == theme
        ]  # fmt: skip
        piles.append([of_theme[i] for i in rng.permutation(len(of_theme))])
    sizes = [0] * len(piles)
    chosen: list[int] = []
    while len(chosen) < count and any(piles):
        # The theme with the fewest items so far is next: themes grow evenly whatever the size of their groups.
        smallest = min((i for i, pile in enumerate(piles) if pile), key=lambda i: sizes[i])
        rows = piles[smallest].pop()
        sizes[smallest] += len(rows)
        chosen.extend(rows)
    return sorted(chosen)


def _theme_of(path: str, themes: tuple[str, ...]) -> str:
    """The theme whose folder holds ``path``; "" when there are no themes, OUTSIDE when it is in none of them."""
    inside = [theme for theme in themes if f"/{theme}/" in f"/{path}"]
    return inside[0] if inside else (OUTSIDE if themes else "")


class Study:
    """One study on disk. ``prepare`` makes what is missing; everything else reads."""

    def __init__(self, settings: StudySettings, corpus: Path, source: Path, root: Path, device: str = "cpu") -> None:
        self.settings, self.corpus, self.source, self.device = settings, corpus, source, device
        facts = {**settings.training(), "corpus": _digest(corpus), "source": directory_revision(source)}
        self.study_id = _short(facts)
        self.query_id = _short({**facts, **asdict(settings)})
        self.directory = root / self.study_id
        self.query_directory = self.directory / f"queries-{self.query_id}"
        self._facts = json.dumps({**facts, **asdict(settings)}, sort_keys=True)

    # -- making it ---------------------------------------------------------------------------

    def prepare(self, progress: Progress = lambda done, total: None) -> None:
        """Encodings, first weights, base model and queries, each made once; ``progress`` counts training steps."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if not (self.directory / "encodings.safetensors").exists():
            _save(self._encode(self.items), self.directory / "encodings.safetensors")
        if not (self.directory / "initial.safetensors").exists():
            _save(self._pretrain(progress), self.directory / "initial.safetensors")
        if not (self.model_directory / "unet" / "config.json").exists():
            average = self.train(np.arange(len(self.items)), self.settings.seed, progress)
            self._write_model(average)
        if not (self.query_directory / "queries.json").exists():
            self._draw_queries()

    def _encode(self, items: list[TeacherItem]) -> dict[str, torch.Tensor]:
        """The fields of a TrainingSet."""
        source = DiffusionModel.load(self.source, self.device)
        distinct = list(dict.fromkeys(i.caption for i in items))
        row = {c: i for i, c in enumerate(distinct)}
        return {
            "latents": source.encode_images([i.image for i in items]),
            "states": torch.cat([source.encode_prompts(distinct[i : i + 64]) for i in range(0, len(distinct), 64)]),
            "caption_row": torch.tensor([row[i.caption] for i in items]),
            "empty": source.encode_prompts([""])[0],
        }

    def _pretrain(self, progress: Progress) -> dict[str, torch.Tensor]:
        """The first weights: random, or trained on the drawings outside of the study's themes."""
        from diffusers import UNet2DConditionModel

        settings = self.settings
        config = UNet2DConditionModel.load_config(self.source / "unet")
        torch.manual_seed(settings.seed)
        unet = UNet2DConditionModel.from_config(
            config, block_out_channels=list(settings.channels), norm_num_groups=settings.norm_groups
        )
        if not settings.pretraining_steps:
            return dict(unet.state_dict())
        recipe = replace(settings.recipe(settings.seed), steps=settings.pretraining_steps, decay=0.2)
        others = TrainingSet(**self._encode(self.outsiders))
        return train(unet, self._schedule(), others, recipe, device=self.device, progress=progress)

    def _write_model(self, average: dict[str, torch.Tensor]) -> None:
        """The source model's directory with this UNet: other parts are linked to nothing, but copied."""
        for part in self.source.iterdir():
            if part.is_dir() and part.name in ("vae", "scheduler", "text_encoder", "tokenizer"):
                shutil.copytree(part, self.model_directory / part.name, dirs_exist_ok=True)
            elif part.name in ("model_index.json", "byline.json"):
                self.model_directory.mkdir(parents=True, exist_ok=True)
                shutil.copy(part, self.model_directory / part.name)
        unet = self.new_unet()
        unet.load_state_dict(average)
        unet.save_pretrained(self.model_directory / "unet.partial")
        (self.model_directory / "unet.partial").rename(self.model_directory / "unet")

    def _draw_queries(self) -> None:
        """Samples of the base model for captions of the subset, spread over it, no two of one caption.

        File order runs through the themes, so the captions are cut into as many stretches as there are queries. Of each
        stretch ``candidates`` captions are drawn and sampled; the sample nearest (cosine of centred latents) to a
        training image of its own caption is kept.
        """
        settings, model = self.settings, self.model()
        captions = list(dict.fromkeys(i.caption for i in self.items))
        rng = np.random.default_rng([settings.seed, 1])
        stretches = [rng.permutation(s)[: settings.candidates] for s in np.array_split(captions, settings.queries)]
        prompts = [str(caption) for stretch in stretches for caption in stretch]
        seeds = [7_000_000 + settings.seed * 10_000 + n for n in range(len(prompts))]
        pictures = self.sample(model, prompts, seeds)
        likeness = self._likeness_to_source(model, pictures, prompts)
        place = np.cumsum([0, *map(len, stretches)])
        best = [int(a + np.argmax(likeness[a:b])) for a, b in pairwise(place)]
        self.query_directory.mkdir(parents=True, exist_ok=True)
        for number, n in enumerate(best):
            pictures[n].save(self.query_directory / f"{number:03d}.png")
        rows = [{"prompt": prompts[n], "seed": seeds[n], "likeness": round(float(likeness[n]), 4)} for n in best]
        _write_text(self.query_directory / "study.json", self._facts)
        _write_text(self.query_directory / "queries.json", json.dumps(rows, indent=1))

    def _likeness_to_source(
        self, model: DiffusionModel, pictures: list[Image.Image], prompts: list[str]
    ) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Largest cosine of each picture's latent with those of the items of its caption, the mean latent taken out."""
        latents = self.training_set.latents.flatten(1)
        mean = latents.mean(0)
        unit = torch.nn.functional.normalize(latents - mean)
        asked = torch.nn.functional.normalize(model.encode_images(pictures).cpu().flatten(1) - mean)
        same = torch.tensor([[item.caption == prompt for item in self.items] for prompt in prompts])
        return (asked @ unit.T).masked_fill(~same, -1.0).amax(1).double().numpy()

    # -- what it holds -----------------------------------------------------------------------

    @property
    def model_directory(self) -> Path:
        """The base model, a diffusers directory."""
        return self.directory / "model"

    def model(self) -> DiffusionModel:
        """The base model, loaded anew."""
        return DiffusionModel.load(self.model_directory, self.device)

    @cached_property
    def _parts(self) -> tuple[list[TeacherItem], list[TeacherItem]]:
        """The subset, and everything outside of its themes; both in file order."""
        everything = read_corpus(self.corpus)
        names = pq.read_schema(self.corpus).names
        wanted = [c for c in ("source_path", "near_duplicate_group") if c in names]
        table = pq.read_table(self.corpus, columns=wanted)
        paths = table["source_path"].to_pylist() if "source_path" in wanted else [""] * len(everything)
        groups = table["near_duplicate_group"].to_pylist() if len(wanted) == 2 else list(range(len(everything)))
        settings = self.settings
        rows = choose_items(paths, groups, settings.themes, settings.items, settings.seed)
        if len(rows) < settings.batch:
            raise LabelsNotUsable(f"{self.corpus} has {len(rows)} items of the study's themes; choose another --size")
        # A group may reach over a theme's edge: nothing like an item of the themes may be among the others.
        related = {g for path, g in zip(paths, groups, strict=True) if _theme_of(path, settings.themes) != OUTSIDE}
        outside = [item for item, g in zip(everything, groups, strict=True) if g not in related]
        return [everything[row] for row in rows], outside

    @property
    def items(self) -> list[TeacherItem]:
        """The subset of the corpus, in file order."""
        return self._parts[0]

    @property
    def outsiders(self) -> list[TeacherItem]:
        """The items of other themes, from which the first weights are made."""
        return self._parts[1]

    @cached_property
    def item_ids(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """int64 [n], as ``items``."""
        return np.array([i.item_id for i in self.items], dtype=np.int64)

    @cached_property
    def prompts(self) -> list[tuple[str, int]]:
        """(prompt, sampling seed) of every query."""
        return [(r["prompt"], r["seed"]) for r in json.loads((self.query_directory / "queries.json").read_text())]

    @cached_property
    def queries(self) -> list[TeacherQuery]:
        """The queries as a teacher is asked them."""
        pictures = [Image.open(self.query_directory / f"{n:03d}.png").convert("RGB")
                    for n in range(len(self.prompts))]  # fmt: skip
        return [TeacherQuery(picture, prompt) for picture, (prompt, _) in zip(pictures, self.prompts, strict=True)]

    def prompt_likeness(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Cosine [q, q] of the queries' prompts in the model's text encoding (mean over tokens, corpus mean out)."""
        states = self.model().encode_prompts([p for p, _ in self.prompts]).mean(1).cpu()
        centred = (states - self.training_set.states.mean((0, 1))).double().numpy()
        unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
        return np.asarray(unit @ unit.T)

    # -- training and measuring --------------------------------------------------------------

    def new_unet(self) -> Any:
        """The UNet at its first weights, the same for every run."""
        from diffusers import UNet2DConditionModel

        config = UNet2DConditionModel.load_config(self.source / "unet")
        unet = UNet2DConditionModel.from_config(
            config, block_out_channels=list(self.settings.channels), norm_num_groups=self.settings.norm_groups
        )
        unet.load_state_dict(load_file(self.directory / "initial.safetensors"))
        return unet

    def _schedule(self) -> Any:
        from diffusers import DDPMScheduler

        return DDPMScheduler.from_pretrained(self.source / "scheduler")

    @cached_property
    def training_set(self) -> TrainingSet:
        """Frozen encodings of the subset."""
        return TrainingSet(**load_file(self.directory / "encodings.safetensors"))

    def train(self, rows: Any, seed: int, progress: Progress = lambda done, total: None) -> dict[str, torch.Tensor]:
        """Averaged weights after training on the items ``rows`` (int [m]) with ``seed``."""
        data = self.training_set.only(torch.as_tensor(np.asarray(rows, dtype=np.int64)))
        average = train(self.new_unet(), self._schedule(), data, self.settings.recipe(seed), device=self.device,
                        progress=progress)  # fmt: skip
        return {k: v.cpu() for k, v in average.items()}

    def sample(self, model: DiffusionModel, prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        """Pictures of the study's sampler."""
        return model.generate(prompts, seeds, steps=self.settings.sampling_steps, guidance=self.settings.guidance)

    @torch.no_grad()
    def losses(self, model: DiffusionModel) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Denoising loss of every query, float64 [q]: the same stratified timesteps and noise for all and always."""
        scheme = NoiseScheme("shared", self.settings.seed + 424_243, self.settings.loss_draws, 1)
        timesteps, noise = scheme.draw("query-loss", range(scheme.draws), model.latent_shape, model.num_timesteps)
        timesteps, noise = timesteps.to(self.device), noise.to(self.device)
        latents = model.encode_images([q.image for q in self.queries])
        states = model.encode_prompts([q.prompt for q in self.queries])
        found = [
            model.denoising_loss(
                latents[q].expand(len(t), -1, -1, -1), states[q].expand(len(t), -1, -1), t, e
            ).double().sum()
            for q in range(len(latents))
            for t, e in zip(timesteps.split(200), noise.split(200), strict=True)
        ]  # fmt: skip
        return torch.stack(found).reshape(len(latents), -1).sum(1).cpu().numpy() / scheme.draws


def _short(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def _digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:16]


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    partial = path.with_suffix(".partial")
    save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, partial)
    partial.replace(path)


def _write_text(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n")
    partial.replace(path)
