"""Items that came after the basis was fitted get their sketch once; the others keep theirs."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from byline.catalog.blobs import BlobStore
from byline.catalog.decode import decode_image
from byline.catalog.items import Item
from byline.diffusion.model import DiffusionModel
from byline.diffusion.tiny import write_tiny_pipeline
from byline.errors import TeacherNotUsable
from byline.teachers import TeacherItem
from byline.teachers.files import SKETCHES, TeacherFiles
from byline.teachers.natural_gradient import UnlearningSettings
from byline.teachers.recipes import Fitting
from byline.teachers.registry import load_ready_teacher
from byline.teachers.sketch_basis import SketchBasis
from byline.teachers.sketch_fit import fit_sketches
from byline.teachers.sketch_set import SketchSet
from services.trainer.sketches import CorpusSketches

KV = "cross_attention_kv"
SETTINGS = UnlearningSettings(corpus_size=8, query_draws=8, item_draws=8, replicates=4, noise="shared")


def png(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    torch.set_num_threads(1)
    return DiffusionModel.load(write_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "model"))


@dataclass
class World:
    """A corpus of seven items, of which the sketch set knows five."""

    model: DiffusionModel
    blobs: BlobStore
    files: TeacherFiles
    items: list[Item]
    fitted: SketchSet | None = None
    loads: list[int] = field(default_factory=list)

    def teacher_items(self) -> list[TeacherItem]:
        return [
            TeacherItem(one.item_id, decode_image(self.blobs.get(one.image_sha256)), one.caption) for one in self.items
        ]

    def load_model(self) -> DiffusionModel:
        self.loads.append(1)
        return self.model

    def sketches(self) -> CorpusSketches:
        return CorpusSketches(self.files, self.model.revision, self.blobs, self.load_model, KV)


@pytest.fixture
def world(model: DiffusionModel, tmp_path: Path) -> World:
    blobs = BlobStore(tmp_path / "blobs")
    items = [Item(10 + n, f"a red cat w{n}", image_sha256=blobs.put(png(n))) for n in range(7)]
    files = TeacherFiles(tmp_path / "cache")
    world = World(model, blobs, files, items)
    linear = load_ready_teacher(
        "abu_plus_linear", model, files, SETTINGS, world.teacher_items, fitting=Fitting(samples=32)
    )
    fitted = fit_sketches(
        linear, world.teacher_items()[:5], dimensions=4, coordinates=200, store=tmp_path / "fit"  # type: ignore[arg-type]
    )
    fitted.save(files.target(SKETCHES))
    world.fitted = SketchSet.load(files.target(SKETCHES), model.revision)
    return world


def nothing(done: int, total: int) -> None:
    """No progress is shown."""


def test_a_model_without_sketches_has_none(model: DiffusionModel, tmp_path: Path) -> None:
    files = TeacherFiles(tmp_path)

    def never() -> DiffusionModel:
        pytest.fail("nothing is to be loaded")

    sketches = CorpusSketches(files, model.revision, BlobStore(tmp_path), never, KV)
    assert sketches.of_items([Item(1, "x")], nothing) is None


def test_known_items_come_from_the_set_in_the_order_asked_and_no_model_is_loaded(world: World) -> None:
    asked = [world.items[3], world.items[0]]
    parts = world.sketches().of_items(asked, nothing)
    assert parts is not None and world.fitted is not None and world.loads == []
    assert parts.item_ids.tolist() == [13, 10]
    np.testing.assert_array_equal(parts.sketches, world.fitted.sketches[[3, 0]])
    assert (parts.section.dimensions, parts.section.query_draws) == (4, 8)
    assert isinstance(parts.basis, SketchBasis) and parts.basis.name == world.fitted.basis.name


def test_sketches_of_the_layers_asked_for_are_preferred(world: World) -> None:
    assert world.fitted is not None
    own = replace(world.fitted, sketches=2 * world.fitted.sketches)
    own.save(world.files.target(f"{SKETCHES}-{KV}"))
    parts = world.sketches().of_items(world.items[:5], nothing)
    assert parts is not None
    np.testing.assert_allclose(parts.sketches, own.sketches, rtol=2e-3)


def test_new_items_are_sketched_once_and_kept_to_the_bit(world: World) -> None:
    seen: list[tuple[int, int]] = []
    first = world.sketches().of_items(world.items[:6], lambda done, total: seen.append((done, total)))
    assert first is not None and len(world.loads) == 1 and seen[0] == (1, 1)
    again = world.sketches().of_items(world.items[:6], nothing)
    assert again is not None and len(world.loads) == 1
    np.testing.assert_array_equal(first.sketches, again.sketches)
    both = world.sketches().of_items(world.items, nothing)
    assert both is not None and len(world.loads) == 2
    np.testing.assert_allclose(both.sketches[5], first.sketches[5], rtol=2e-3)
    # The same as if the item had been there when its neighbours got theirs, up to half precision.
    linear = load_ready_teacher("abu_plus_linear", world.model, world.files, SETTINGS, world.teacher_items)
    from byline.teachers.sketch import SketchTeacher

    assert world.fitted is not None
    teacher = SketchTeacher(world.model, linear.curvature, world.fitted.basis)  # type: ignore[attr-defined]
    expected = teacher.item_sketches(world.teacher_items()[5:])
    np.testing.assert_allclose(both.sketches[5:], expected, atol=2e-3 * np.abs(expected).max())


def test_items_of_another_model_revision_are_not_taken(world: World) -> None:
    other = CorpusSketches(world.files, "another-revision", world.blobs, world.load_model, KV)
    assert other.of_items(world.items[:2], nothing) is None


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"x"), lambda path: path.unlink()])
def test_damaged_sketches_of_later_items_are_made_again(world: World, damage: Callable[[Path], object]) -> None:
    first = world.sketches().of_items(world.items, nothing)
    [later] = [path for path in world.files.cache.iterdir() if path.name.startswith("sketches-later")]
    damage(later / "sketches.safetensors")
    again = world.sketches().of_items(world.items, nothing)
    assert first is not None and again is not None and len(world.loads) == 2
    np.testing.assert_array_equal(first.sketches, again.sketches)


def test_without_the_curvature_new_items_cannot_be_sketched(world: World) -> None:
    for folder in world.files.cache.glob("curvature*"):
        folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(TeacherNotUsable, match="2 items have no sketch"):
        world.sketches().of_items(world.items, nothing)
