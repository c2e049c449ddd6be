"""Fitting sketches: one pass of gradients over the corpus, then principal directions from a file.

Why it exists: all whitened gradients of a corpus do not fit into memory, nor, of a large corpus, onto a disk. Those of
a seeded sample of items are kept in a resumable file [s, m] until their principal directions are found; all other
items are projected as they come, still in one pass (the basis carries over to items it has not seen: measured, C5).
There is no centring: it is inner products that must survive. The full first-order scores of some queries are taken
in the same pass, so the manifest can say what the cut costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from byline.errors import TeacherNotUsable
from byline.evaluation.agreement import spearman
from byline.evaluation.map import mean_average_precision
from byline.teachers.curvature import Curvature
from byline.teachers.first_order import AbuPlusLinear
from byline.teachers.item_gradients import GradientBlock
from byline.teachers.natural_gradient import query_blocks
from byline.teachers.packed_directions import principal_directions
from byline.teachers.ranking import Check, Progress, TeacherItem, TeacherQuery, ignore_progress, never_cancelled
from byline.teachers.row_store import RowStore, digest_of
from byline.teachers.sketch_basis import Coordinates, SketchBasis, whitened_layers
from byline.teachers.sketch_set import SketchSet
from byline.teachers.token_gradients import TokenBasis, TokenGradients, stacked_deltas

#: Items whose gradients decide which coordinates have the largest energy, where not all are kept.
ENERGY_SAMPLE = 256
#: Directions of token gradients: 768 of the demo's 1,024 keep mAP(100) at .978 to .999 (docs/teacher.md).
TOKEN_RANK = 768

Whitened = Iterator[tuple[str, torch.Tensor]]
#: Told which items a chunk holds (places in the corpus) and their gradients, one block per orientation, before
#: the chunk counts as written.
Visit = Callable[[NDArray[np.int64], Sequence[GradientBlock]], None]


@dataclass(frozen=True)
class _Pass:
    """A pass of whitened gradients over ``items`` by ``teacher``; ``cost``: further bytes each item needs."""

    teacher: AbuPlusLinear
    items: Sequence[TeacherItem]
    cost: int
    visit: Callable[[slice, Sequence[GradientBlock]], None] | None = None

    def chunks(self, written: NDArray[np.bool_], progress: Progress, check: Check) -> Iterator[tuple[slice, Whitened]]:
        """(rows, whitened gradients of their items layer by layer) of the chunks not wholly ``written``."""
        teacher = self.teacher
        largest = max(layer.rows * layer.columns for layer in teacher.gradients.layers.values())
        chunk = teacher.chunk_for(self.cost + 12 * largest)
        orientations = (False,) if teacher.settings.flips == "none" else (False, True)
        for start in range(0, len(self.items), chunk):
            place = slice(start, min(start + chunk, len(self.items)))
            if not written[place].all():
                part = self.items[place]
                blocks = [teacher.gradients.block(part, flipped, check=check) for flipped in orientations]
                if self.visit is not None:
                    self.visit(place, blocks)
                yield place, whitened_layers(teacher.curvature, teacher.settings.damping, blocks)
            progress(place.stop, len(self.items))


def whitened_items(
    teacher: AbuPlusLinear,
    items: Sequence[TeacherItem],
    progress: Progress,
    check: Check,
    visit: Callable[[slice, Sequence[GradientBlock]], None] | None = None,
) -> Iterator[tuple[slice, Whitened]]:
    """Whitened mean gradients of ``items``, chunk by chunk, layer by layer [k, rows, columns].

    With flips ``mean`` the mean of both orientations; ``max`` is not linear and is refused.
    """
    require_linear(teacher)
    return _Pass(teacher, items, 0, visit).chunks(np.zeros(len(items), dtype=bool), progress, check)


def require_linear(teacher: AbuPlusLinear) -> None:
    """Raise TeacherNotUsable for settings under which tau is no inner product."""
    if teacher.settings.flips == "max":
        raise TeacherNotUsable("the higher of two orientations is no inner product: sketch with flips none or mean")


def fit_sketches(
    teacher: AbuPlusLinear,
    items: Sequence[TeacherItem],
    *,
    dimensions: int = 512,
    coordinates: int | None = None,
    bits: int = 1,
    token_rank: int | None = None,
    basis_items: int = 4096,
    fidelity_queries: Sequence[TeacherQuery] = (),
    store: Path,
    seed: int = 0,
    visit: Visit | None = None,
    progress: Progress = ignore_progress,
    check: Check = never_cancelled,
) -> SketchSet:
    """Sketches of ``items`` in ``dimensions`` principal directions of at most ``basis_items`` of them.

    ``coordinates``: only so many entries of the gradients, those of largest energy; default all. ``bits`` per
    number of the basis (``packed_directions``). ``token_rank``: directions of the token gradients that are kept as
    well where the layers read the text alone (``token_gradients``); 0 for none. ``store`` is a directory for
    what a killed fit goes on from, 2 bytes per coordinate and item of the basis; it belongs to these items, queries
    and settings (others are refused, TeacherNotUsable). Fewer dimensions than asked for where the items span
    fewer. ``visit`` is for whoever wants more of the same gradients, full labels for one. ``progress`` counts
    items of the one long pass.
    """
    require_linear(teacher)
    if not items:
        raise TeacherNotUsable("sketches are fitted on a corpus, and it holds no items")
    queries = _whitened_queries(teacher, fidelity_queries, check)
    kept = _coordinates(teacher, items, coordinates, seed, store, check)
    asked = kept.pick(queries.items())  # [q, m]
    fingerprint = teacher.curvature.fingerprint(kept.kept)
    identity = digest_of(
        f"{teacher.teacher_id}/{fingerprint}", items, {**{f"kept {n}": k for n, k in kept.kept.items()}, "q": asked}
    )
    chosen = np.sort(np.random.default_rng(seed).permutation(len(items))[:basis_items])
    rank = _token_rank(teacher) if token_rank is None else token_rank
    tokens = _TokenPass(teacher, items, store, identity) if rank else None
    gather = _Gather(teacher, items, queries, store, progress, check, visit, tokens)
    # One item's root mean square: with it the numbers are of order one, as half precision wants them.
    _place, first = next(whitened_items(teacher, [items[chosen[0]]], ignore_progress, check))
    unit = float(kept.pick(first).pow(2).mean().sqrt()) or 1.0
    rows, full = gather.rows(
        chosen,
        "coordinates",
        f"{identity}/{seed}",
        kept.count,
        np.float16,
        lambda pairs: _half(kept.pick(pairs) / unit),
        0,
    )
    check()
    path = store / f"basis-{identity}-{dimensions}-{bits}-{seed}.safetensors"
    if not path.exists():
        building = path.with_suffix(".building")
        SketchBasis(
            kept, principal_directions(rows, dimensions, bits, check), teacher.model.revision,
            teacher.curvature.selection, teacher.curvature.name, teacher.settings, fingerprint,
        ).save(building)  # fmt: skip
        building.replace(path)
    basis = SketchBasis.load(path, teacher.model.revision)
    sketches = np.empty((len(items), basis.dimensions), dtype=np.float32)
    truth = np.empty((len(items), len(asked)))
    truth[chosen] = full
    for start in range(0, len(chosen), 256):
        part = torch.from_numpy(rows[start : start + 256].astype(np.float32))
        sketches[chosen[start : start + 256]] = basis.directions.project(part).numpy() * unit
    others = np.setdiff1d(np.arange(len(items)), chosen)
    if len(others):
        sketches[others], truth[others] = gather.rows(
            others,
            "sketches",
            f"{identity}/{dimensions}/{bits}/{seed}",
            basis.dimensions,
            np.float32,
            basis.project,
            len(chosen),
        )
    ids = np.array([item.item_id for item in items], dtype=np.int64)
    encoded = None if tokens is None else tokens.encoded(rank, chosen)
    fidelity = _fidelity(basis.directions.project(asked).cpu().numpy() @ sketches.T, truth.T) | {
        "queries": float(len(asked)),
        "draws": float(teacher.settings.query_draws),
        "dimensions": float(basis.dimensions),
        "coordinates": float(kept.count),
        "bits": float(bits),
        "items": float(len(items)),
        "basis_items": float(len(chosen)),
    }
    if encoded is not None and len(fidelity_queries):
        natural = teacher.directions(fidelity_queries, check=check)
        scores = encoded.scores(encoded.basis.directions(natural))
        fidelity |= {f"token_{name}": value for name, value in _fidelity(scores, truth.T).items()}
        fidelity["token_rank"] = float(encoded.basis.rank)
    return SketchSet(basis, ids, sketches, fidelity, teacher.teacher_id, encoded)


@dataclass(frozen=True)
class _TokenPass:
    """Keeps the items' output gradients by token, in a resumable file, until they can be encoded."""

    teacher: AbuPlusLinear
    items: Sequence[TeacherItem]
    store: Path
    identity: str

    def rows(self) -> RowStore:
        """[n, tokens x R], in single precision."""
        tokens = self.teacher.model.encode_prompts([""]).shape[1]
        width = tokens * sum(layer.rows for layer in self.teacher.gradients.layers.values())
        return RowStore.open(self.store / "deltas.npy", (len(self.items), width), np.float32, self.identity)

    def put(self, held: RowStore, places: NDArray[np.int64], blocks: Sequence[GradientBlock]) -> None:
        """Keep what ``blocks`` say of the items at ``places``."""
        held.put_at(places, stacked_deltas(blocks).flatten(1).cpu().numpy())

    def encoded(self, rank: int, chosen: NDArray[np.int64]) -> TokenGradients:
        """All items' token gradients, in the leading directions of the ``chosen`` ones'."""
        model, curvature = self.teacher.model, self.teacher.curvature
        if not isinstance(curvature, Curvature):
            raise TeacherNotUsable("token gradients need EK-FAC curvature: fit the sketches without them")
        captions = [item.caption for item in self.items]
        tokens = model.encode_prompts([""]).shape[1]
        deltas = torch.from_numpy(np.asarray(self.rows().rows)).unflatten(1, (tokens, -1))  # [n, tokens, R], on disk
        layers = tuple(self.teacher.gradients.layers)
        parts = (deltas[chosen[start : start + 256]].flatten(0, 1) for start in range(0, len(chosen), 256))
        basis = TokenBasis.fit(curvature, layers, parts, rank, self.teacher.settings.damping)
        ids = np.array([item.item_id for item in self.items], dtype=np.int64)
        return TokenGradients.encode(basis, ids, deltas, captions, model.encode_prompts)


@dataclass(frozen=True)
class _Gather:
    """Runs the pass over some of the items, into resumable files in ``store``."""

    teacher: AbuPlusLinear
    items: Sequence[TeacherItem]
    queries: dict[str, torch.Tensor]
    store: Path
    progress: Progress
    check: Check
    visit: Visit | None
    tokens: _TokenPass | None

    def rows(
        self, chosen: NDArray[np.int64], name: str, identity: str, width: int, dtype: type[np.generic],
        reduce: Callable[[Whitened], NDArray[np.floating]], before: int,
    ) -> tuple[NDArray[np.floating], NDArray[np.float64]]:  # fmt: skip
        """What ``reduce`` makes of the items' gradients [n, width], and their full scores [n, q]."""
        asked = len(next(iter(self.queries.values())))
        held = RowStore.open(self.store / f"{name}.npy", (len(chosen), width), dtype, identity)
        full = RowStore.open(self.store / f"{name}-full.npy", (len(chosen), asked), np.float64, identity)

        deltas = None if self.tokens is None else self.tokens.rows()

        def visited(place: slice, blocks: Sequence[GradientBlock]) -> None:
            if self.visit is not None:
                self.visit(chosen[place], blocks)
            if self.tokens is not None and deltas is not None:
                self.tokens.put(deltas, chosen[place], blocks)

        one_pass = _Pass(self.teacher, [self.items[i] for i in chosen], 4 * width, visited)
        written = held.written & full.written
        if deltas is not None:
            written = written & deltas.written[chosen]

        def onward(done: int, _total: int) -> None:
            self.progress(before + done, len(self.items))

        for place, whitened in one_pass.chunks(written, onward, self.check):
            met = torch.zeros(place.stop - place.start, asked, dtype=torch.float64)
            held.put(place, reduce(_meeting(whitened, self.queries, met)))
            full.put(place, met.numpy())
        return held.rows, full.rows


def _token_rank(teacher: AbuPlusLinear) -> int:
    """TOKEN_RANK, where the layers have token gradients at all."""
    layers = teacher.gradients.layers.values()
    fits = all(layer.reads_text for layer in layers) and isinstance(teacher.curvature, Curvature)
    return min(TOKEN_RANK, sum(layer.rows for layer in layers)) if fits else 0


def _half(values: torch.Tensor) -> NDArray[np.floating]:
    found: NDArray[np.floating] = values.clamp(-65504, 65504).half().cpu().numpy()
    return found


def _coordinates(
    teacher: AbuPlusLinear, items: Sequence[TeacherItem], count: int | None, seed: int, store: Path, check: Check
) -> Coordinates:
    """All coordinates of the teacher's layers, or the ``count`` of largest energy."""
    sizes = {name: layer.rows * layer.columns for name, layer in teacher.gradients.layers.items()}
    if count is None or count >= sum(sizes.values()):
        return Coordinates({name: torch.arange(size) for name, size in sizes.items()})
    return Coordinates.of_largest(_energy(teacher, items, seed, store, check), count)


def _meeting(whitened: Whitened, queries: dict[str, torch.Tensor], met: torch.Tensor) -> Whitened:
    """``whitened`` passed on, while its products with ``queries`` are added to ``met`` [n, q]."""
    for name, value in whitened:
        met += (value.flatten(1) @ queries[name].flatten(1).T).double().cpu()
        yield name, value


def _whitened_queries(teacher: AbuPlusLinear, queries: Sequence[TeacherQuery], check: Check) -> dict[str, torch.Tensor]:
    """Whitened gradients of the queries, per layer [q, rows, columns]."""
    layers = teacher.gradients.layers
    found = {n: torch.zeros(len(queries), e.rows, e.columns, device=teacher.model.device) for n, e in layers.items()}
    for place, block in query_blocks(
        teacher.model, layers, queries, teacher.settings, batch=teacher.batch, memory=teacher.memory, check=check
    ):
        for name, value in whitened_layers(teacher.curvature, teacher.settings.damping, [block]):
            found[name][place] = value
    return found


def _energy(
    teacher: AbuPlusLinear, items: Sequence[TeacherItem], seed: int, store: Path, check: Check
) -> dict[str, torch.Tensor]:
    """Mean square of every whitened coordinate over a seeded sample of items, per layer [rows, columns]."""
    chosen = np.random.default_rng(seed).permutation(len(items))[:ENERGY_SAMPLE]
    sample = [items[i] for i in sorted(chosen)]
    layers = teacher.gradients.layers
    sizes = {name: layer.rows * layer.columns for name, layer in layers.items()}
    sums = RowStore.open(
        store / "energy.npy", (1, sum(sizes.values())), np.float64, digest_of(teacher.teacher_id, sample, {})
    )
    if not sums.written[0]:
        total = {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}
        for _place, whitened in whitened_items(teacher, sample, ignore_progress, check):
            for name, value in whitened:
                total[name] += value.flatten(1).double().pow(2).sum(0).cpu() / len(sample)
        sums.put(slice(0, 1), torch.cat(list(total.values())).numpy()[None])
    parts = torch.from_numpy(np.array(sums.rows[0])).split(list(sizes.values()))
    return {n: part.reshape(e.rows, e.columns) for (n, e), part in zip(layers.items(), parts, strict=True)}


def _fidelity(scores: NDArray[np.float32], full: NDArray[np.float64]) -> dict[str, float]:
    """How ``scores`` [q, n] rank against ``full`` [q, n]: mAP at 20 and 100, and Spearman; NaN without queries."""
    if not len(full) or full.shape[1] < 2:
        return {"map20": float("nan"), "map100": float("nan"), "spearman": float("nan")}
    truth = full.astype(np.float32)
    return {
        "map20": mean_average_precision(scores, truth, 20).mean,
        "map100": mean_average_precision(scores, truth, 100).mean,
        "spearman": float(np.mean([spearman(a, b) for a, b in zip(scores, truth, strict=True)])),
    }
