"""A refresh end to end on a small corpus: real Postgres, real releases, features made by arithmetic."""

from __future__ import annotations

import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from byline.catalog.items import Item
from byline.catalog.store import CatalogStore, ModelRecord
from byline.db.session import make_engine, transaction
from byline.errors import LabelsNotUsable, ReleaseCorrupt, TeacherNotUsable
from byline.ranker.head import load_head
from byline.rankings.labelled import count_rankings
from byline.rankings.store import LabelledQuery, RankingStore
from byline.releases.loader import load_release
from byline.releases.manifest import HEAD, ReleaseManifest
from byline.releases.registry import ReleaseRegistry, ReleaseState
from byline.releases.sketches import SketchParts, section_of
from byline.security.errors import SignatureInvalid
from byline.security.signing import Keyring, sign_manifest
from services.trainer import refresh
from services.trainer.candidates import Start
from services.trainer.gate import GateLimits
from services.trainer.observe import Observer, last_refresh
from services.trainer.refresh import Refresher, RefreshSettings
from services.trainer.schedule import Due, LastRefresh, Observed, Trigger

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ITEMS, LATENT = 160, 8
LIMITS = GateLimits(map_floor=0.05, tolerance=0.02, confidence=0.95)


@dataclass(frozen=True)
class Labels:
    """A Ranking as a teacher gives it."""

    item_ids: np.ndarray
    tau: np.ndarray
    standard_error: np.ndarray
    tau_halves: np.ndarray
    samples: np.ndarray | None = None
    draws: int = 16
    teacher_id: str = "abu_plus_linear/00aa/kv/item"
    candidate_set: str = "corpus"


@dataclass
class World:
    """Latent vectors behind items and queries; features and influence are both made from them."""

    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    queries: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.items = self.rng.normal(size=(ITEMS, LATENT))
        self.weight = self.rng.exponential(size=LATENT) ** 2
        self.mix = self.rng.normal(size=(LATENT, 32))

    def features(self, latent: np.ndarray) -> np.ndarray:
        return np.tanh(latent @ self.mix / 3).astype(np.float32)

    def labels(self, prompt: str) -> Labels:
        # By the prompt alone: another process knows the same queries.
        latent = self.queries.setdefault(prompt, np.random.default_rng(zlib.crc32(prompt.encode())).normal(size=LATENT))
        tau = self.items @ (self.weight * latent)
        halves = (tau + 0.2 * tau.std() * self.rng.normal(size=(2, ITEMS))).astype(np.float32)
        return Labels(np.arange(ITEMS), halves.mean(0), np.full(ITEMS, 0.1, np.float32), halves)


class ArithmeticFeatures:
    """FeatureRows without an encoder."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.spec = "efficientnet_lite0"
        self.preprocessing_hash = "0" * 16
        self.blocks = (("efficientnet_lite0", 32),)

    def of_items(self, items: Sequence[Item], progress) -> np.ndarray:
        return self.world.features(self.world.items[[item.item_id for item in items]])

    def of_queries(self, rankings: Sequence[LabelledQuery], progress) -> np.ndarray:
        return self.world.features(np.stack([self.world.queries[ranking.prompt] for ranking in rankings]))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def engine(database_url: str):
    engine = make_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def world(engine, tmp_path: Path) -> World:
    world = World()
    catalog = CatalogStore(engine)
    catalog.add_corpus("toy")
    catalog.add_items("toy", [Item(i, f"item {i}", image_sha256=f"{i:064x}") for i in range(ITEMS)])
    catalog.add_model(ModelRecord("toy", "toy", tmp_path / "model", "rev1"))
    return world


def _add(engine, world: World, split: str, numbers: range, **changes) -> None:
    store = RankingStore(engine)
    with transaction(engine) as connection:
        for number in numbers:
            prompt = f"{split} {number}"
            query = store.add_query(connection, model_id="toy", prompt=prompt, seed=number, split=split,
                                    near_duplicate_group=number, image_sha256=uuid.UUID(int=number).hex * 2,
                                    source="corpus")
            store.add_ranking(connection, query, replace(world.labels(prompt), **changes))


def _refresher(engine, world: World, tmp_path: Path, sketches=None, **changes) -> Refresher:
    settings = {"model_id": "toy", "teacher_family": "abu_plus_linear", "cutoff": 15, "limits": LIMITS, "epochs": 60,
                "hidden": (48,), "out_dim": 32, **changes}
    return Refresher(
        engine, tmp_path / "releases", ArithmeticFeatures(world), RefreshSettings(**settings), sketches
    )


class ArithmeticSketches:
    """SketchRows that are the items' latent vectors; ``error`` is raised instead, ``gone`` means the model has none."""

    def __init__(self, world: World, error: Exception | None = None, gone: bool = False) -> None:
        self.world, self.error, self.gone = world, error, gone

    def save(self, path: Path) -> None:
        """The basis they stand in."""
        path.write_bytes(b"basis")

    def of_items(self, items: Sequence[Item], progress) -> SketchParts | None:
        if self.error is not None:
            raise self.error
        ids = np.array([item.item_id for item in items])
        section = section_of(
            teacher_id="sketch/1", dimensions=LATENT, selection="all", query_draws=8, fidelity={"map100": 0.9}
        )
        return None if self.gone else SketchParts(ids, self.world.items[ids].astype(np.float32), self, section)


def test_rankings_become_an_active_release_that_beats_raw_features(engine, world, tmp_path: Path):
    _add(engine, world, "train", range(40))
    _add(engine, world, "validation", range(12))
    steps: list[str] = []
    outcome = _refresher(engine, world, tmp_path).run_once(
        now=NOW, seed=0, progress=lambda what, done, total: steps.append(what))
    registry = ReleaseRegistry(engine)
    active = registry.active("toy")
    assert outcome.activated and active is not None and active.release_id == outcome.release_id
    assert outcome.report.best("head").result.mean > outcome.report.best("raw").result.mean
    record = registry.get(outcome.release_id)
    assert record.state is ReleaseState.ACTIVE
    assert record.manifest.labels.queries == 52 == count_rankings(engine, "toy", "abu_plus_linear")
    assert record.metrics["gate"]["passed"] and record.metrics["labels"]["judged_on_disjoint_noise"]
    assert record.metrics["map"]["head"] == outcome.report.best("head").result.mean
    assert load_head(record.directory / HEAD).config.in_dim == 32
    assert ReleaseManifest.read(record.directory).items == ITEMS
    assert "fit the head" in steps


def test_a_refresh_starts_from_no_head_that_is_not_signed_or_was_altered(engine, world, tmp_path: Path, monkeypatch):
    _add(engine, world, "train", range(20))
    _add(engine, world, "validation", range(12))
    keyring = Keyring.parse("k" * 40)
    unsigned = _refresher(engine, world, tmp_path).run_once(now=NOW, seed=0)
    monkeypatch.setattr(refresh, "load_head", lambda path: pytest.fail("the head was opened"))
    with pytest.raises(SignatureInvalid):
        _refresher(engine, world, tmp_path, keyring=keyring).run_once(now=NOW, seed=0)
    directory = ReleaseRegistry(engine).get(unsigned.release_id).directory
    sign_manifest(directory, ReleaseManifest.read(directory).digest, keyring)
    (directory / HEAD).chmod(0o644)
    (directory / HEAD).write_bytes(b"evil")
    with pytest.raises(ReleaseCorrupt, match="altered"):
        _refresher(engine, world, tmp_path, keyring=keyring).run_once(now=NOW, seed=0)


def test_labels_whose_halves_share_the_items_noise_are_not_said_to_judge_by_other_noise(engine, world, tmp_path: Path):
    for split, numbers in (("train", range(20)), ("validation", range(12))):
        _add(engine, world, split, numbers, teacher_id="sketch+output_norm/00aa/kv/shared")
    refresher = _refresher(engine, world, tmp_path, teacher_family="sketch+output_norm", epochs=2)
    outcome = refresher.run_once(now=NOW, seed=0)
    metrics = ReleaseRegistry(engine).get(outcome.release_id).metrics
    assert metrics["labels"]["judged_on_disjoint_noise"] is False and metrics["map"]["ceiling"] is None


def test_the_published_release_answers_in_the_order_the_gate_judged(engine, world, tmp_path: Path):
    _add(engine, world, "train", range(20))
    _add(engine, world, "validation", range(12))
    outcome = _refresher(engine, world, tmp_path).run_once(now=NOW, seed=0)
    release = load_release(ReleaseRegistry(engine).get(outcome.release_id).directory)
    query = world.features(world.queries["validation 3"])
    scores = release.head.scores(query[None, :], world.features(world.items))[0]
    hits = release.search(query, 10)
    assert [hit.item_id for hit in hits] == np.argsort(-scores, kind="stable")[:10].tolist()
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(scores)[::-1][:10], atol=1e-5)


def test_more_rankings_lead_to_a_second_release_from_whichever_start_validates_better(engine, world, tmp_path: Path):
    _add(engine, world, "train", range(40))
    _add(engine, world, "validation", range(12))
    refresher = _refresher(engine, world, tmp_path)
    first = refresher.run_once(now=NOW, seed=0)
    _add(engine, world, "train", range(40, 48))
    due = [Due(Trigger.RANKINGS, "8 new rankings")]
    second = refresher.run_once(now=NOW + timedelta(minutes=5), seed=0, due=due)
    assert first.start is Start.FRESH and second.activated
    made = ReleaseRegistry(engine).get(second.release_id).manifest.refresh
    assert made is not None and set(made.validation_map) == {"warm", "fresh"}
    assert made.start == second.start == max(made.validation_map, key=lambda start: made.validation_map[start])
    assert [(one.trigger, one.detail) for one in made.triggers] == [("rankings", "8 new rankings")]
    active = ReleaseRegistry(engine).active("toy")
    assert active is not None
    assert (active.release_id, active.previous_release_id) == (second.release_id, first.release_id)


def test_a_candidate_below_the_floor_is_recorded_as_rejected_and_changes_nothing(engine, world, tmp_path: Path):
    _add(engine, world, "train", range(20))
    _add(engine, world, "validation", range(12))
    limits = GateLimits(map_floor=0.999, tolerance=0.02, confidence=0.95)
    outcome = _refresher(engine, world, tmp_path, limits=limits).run_once(now=NOW, seed=0)
    registry = ReleaseRegistry(engine)
    record = registry.get(outcome.release_id)
    assert not outcome.activated and registry.active("toy") is None
    assert record.state is ReleaseState.REJECTED and record.reason.startswith("MAP_BELOW_FLOOR")


def test_a_withdrawn_item_is_not_in_the_next_release(engine, world, tmp_path: Path):
    _add(engine, world, "train", range(20))
    _add(engine, world, "validation", range(12))
    CatalogStore(engine).withdraw([7])
    outcome = _refresher(engine, world, tmp_path).run_once(now=NOW, seed=0)
    assert ReleaseRegistry(engine).get(outcome.release_id).manifest.items == ITEMS - 1


def test_a_changed_corpus_is_published_with_the_head_that_answers(engine, world, tmp_path: Path):
    _add(engine, world, "train", range(20))
    _add(engine, world, "validation", range(12))
    refresher = _refresher(engine, world, tmp_path)
    first = refresher.run_once(now=NOW, seed=0)
    CatalogStore(engine).withdraw([7])
    due = [Due(Trigger.CORPUS, "1 withdrawn")]
    second = refresher.run_once(now=NOW + timedelta(minutes=5), seed=0, due=due)
    assert second.activated and second.start is Start.KEPT
    registry = ReleaseRegistry(engine)
    before, after = (registry.get(one.release_id) for one in (first, second))
    assert after.manifest.items == ITEMS - 1
    heads = [load_head(record.directory / HEAD).state_dict() for record in (before, after)]
    assert all(torch.equal(tensor, heads[1][name]) for name, tensor in heads[0].items())


def test_the_trainer_sees_what_changed_since_the_snapshot_of_the_active_release(engine, world, tmp_path: Path):
    _add(engine, world, "train", range(20))
    _add(engine, world, "validation", range(12))
    observer = Observer(engine, "toy", "abu_plus_linear")
    assert observer.look() == Observed(32)
    _refresher(engine, world, tmp_path).run_once(now=NOW, seed=0)
    assert observer.look().corpus is None
    catalog = CatalogStore(engine)
    catalog.add_items("toy", [Item(i, f"item {i}", image_sha256=f"{i:064x}") for i in (ITEMS, ITEMS + 1)])
    catalog.withdraw([7, ITEMS + 1])
    change = observer.look().corpus
    assert change is not None and (change.added, change.withdrawn) == (1, 1) and change.last_at is not None


def test_enough_test_queries_judge_instead_of_the_validation_ones(engine, world, tmp_path: Path):
    _add(engine, world, "train", range(20))
    _add(engine, world, "validation", range(6))
    _add(engine, world, "test", range(11))
    outcome = _refresher(engine, world, tmp_path).run_once(now=NOW, seed=0)
    assert outcome.report.queries == 11
    record = ReleaseRegistry(engine).get(outcome.release_id)
    assert record.metrics["labels"]["held_out_split"] == "test"


def test_without_validation_rankings_a_refresh_says_so(engine, world, tmp_path: Path):
    _add(engine, world, "train", range(5))
    with pytest.raises(LabelsNotUsable, match="validation"):
        _refresher(engine, world, tmp_path).run_once(now=NOW, seed=0)
    assert ReleaseRegistry(engine).list("toy") == []


def test_a_candidate_left_unjudged_by_a_kill_does_not_hold_up_the_next_refresh(
    engine, world, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _add(engine, world, "train", range(20))
    _add(engine, world, "validation", range(12))
    registry, refresher = ReleaseRegistry(engine), _refresher(engine, world, tmp_path)
    assert last_refresh(registry, "toy") is None

    def killed(*arguments: object) -> bool:
        raise SystemExit(137)

    with monkeypatch.context() as patch:
        patch.setattr(Refresher, "_publish", killed)
        with pytest.raises(SystemExit):
            refresher.run_once(now=NOW, seed=0)
    assert [record.state for record in registry.list("toy")] == [ReleaseState.BUILT]
    assert last_refresh(registry, "toy") is None
    later = NOW + timedelta(minutes=1)
    refresher.run_once(now=later, seed=0)
    assert last_refresh(registry, "toy") == LastRefresh(32, later)


def test_a_release_carries_the_sketches_of_its_items_and_of_no_withdrawn_one(engine, world, tmp_path: Path):
    _add(engine, world, "train", range(20))
    _add(engine, world, "validation", range(12))
    CatalogStore(engine).withdraw([7])
    sketches = ArithmeticSketches(world)
    outcome = _refresher(engine, world, tmp_path, sketches).run_once(now=NOW, seed=0)
    record = ReleaseRegistry(engine).get(outcome.release_id)
    release = load_release(record.directory, expected=record.manifest)
    assert release.sketches is not None and release.sketches.index.ntotal == ITEMS - 1
    assert 7 not in release.sketches.index.ids
    assert record.manifest.sketches is not None and record.manifest.sketches.fidelity == {"map100": 0.9}
    assert record.metrics["sketches"] == {"left_out": None}


@pytest.mark.parametrize(
    ("fault", "says"),
    [({"gone": True}, "the model has none"), ({"error": TeacherNotUsable("no curvature")}, "TEACHER_NOT_USABLE")],
)
def test_without_sketches_a_head_is_published_all_the_same_and_the_release_says_why(
    engine, world, tmp_path: Path, fault, says
):
    _add(engine, world, "train", range(20))
    _add(engine, world, "validation", range(12))
    sketches = ArithmeticSketches(world, **fault)
    outcome = _refresher(engine, world, tmp_path, sketches).run_once(now=NOW, seed=0)
    record = ReleaseRegistry(engine).get(outcome.release_id)
    assert outcome.activated and record.manifest.sketches is None
    assert record.metrics["sketches"]["left_out"].startswith(says)
