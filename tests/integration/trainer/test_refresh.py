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
from sqlalchemy import text

from byline.catalog.items import Item
from byline.catalog.store import CatalogStore, ModelRecord
from byline.db.session import make_engine, transaction
from byline.errors import CorpusNotUsable, LabelsNotUsable, ReleaseCorrupt, TeacherNotUsable
from byline.ranker.head import load_head
from byline.rankings.labelled import count_rankings
from byline.rankings.store import LabelledQuery, RankingStore
from byline.releases.garbage import KeepRule
from byline.releases.loader import load_release
from byline.releases.manifest import HEAD, ReleaseManifest
from byline.releases.registry import ReleaseRegistry, ReleaseState
from byline.releases.requests import RefreshRequests
from byline.releases.sketches import SketchParts, section_of
from byline.security.errors import SignatureInvalid
from byline.security.signing import Keyring, sign_manifest
from services.trainer import refresh
from services.trainer.candidates import Start
from services.trainer.gate import GateLimits
from services.trainer.leftovers import settle_leftovers
from services.trainer.observe import Observer, last_refresh
from services.trainer.refresh import Refresher, RefreshSettings
from services.trainer.schedule import Due, LastRefresh, Observed, RefreshRule, Trigger
from services.trainer.work import TrainerWork

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ITEMS, LATENT = 160, 8
LIMITS = GateLimits(map_floor=0.05, tolerance=0.02, confidence=0.95)
#: Lets every head of the right sign pass.
LENIENT = GateLimits(map_floor=0.0, tolerance=1.0, confidence=0.95, slice_tolerance=1.0)


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
        self.lost: set[int] = set()
        self.lost_prompts: set[str] = set()
        self.lost_pictures: set[str] = set()

    def lost_items(self, items: Sequence[Item], progress) -> dict[int, str]:
        return {item.item_id: "BLOB_NOT_FOUND" for item in items if item.item_id in self.lost}

    def lost_queries(self, rankings: Sequence[LabelledQuery], progress) -> dict[int, str]:
        return {place: "BLOB_NOT_FOUND" for place, one in enumerate(rankings) if one.prompt in self.lost_prompts}

    def lost_images(self, rankings: Sequence[LabelledQuery]) -> dict[int, str]:
        return {place: "BLOB_NOT_FOUND" for place, one in enumerate(rankings) if one.prompt in self.lost_pictures}

    def of_items(self, items: Sequence[Item], progress) -> np.ndarray:
        assert not self.lost & {item.item_id for item in items}
        return self.world.features(self.world.items[[item.item_id for item in items]])

    def of_queries(self, rankings: Sequence[LabelledQuery], progress) -> np.ndarray:
        assert not self.lost_prompts & {ranking.prompt for ranking in rankings}
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


def _refresher(
    engine, world: World, tmp_path: Path, sketches=None, features=None, kind=Refresher, **changes
) -> Refresher:
    settings = {"model_id": "toy", "teacher_family": "abu_plus_linear", "cutoff": 15, "limits": LIMITS, "epochs": 60,
                "hidden": (48,), "out_dim": 32, **changes}
    return kind(
        engine, tmp_path / "releases", features or ArithmeticFeatures(world), RefreshSettings(**settings), sketches
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
    registry = ReleaseRegistry(engine)
    active = registry.active("toy")
    assert active is not None
    assert (active.release_id, active.previous_release_id) == (second.release_id, first.release_id)
    # Nobody made these items, so all twelve queries are of one creator; thirds of them are too few to judge.
    judged = registry.get(second.release_id).manifest.metrics["gate"]["slices"]
    assert [(one["queries"], one["not_judged"]) for one in judged if one["cut"].startswith("creator")] == [(12, None)]
    assert {one["not_judged"] for one in judged if one["cut"].startswith("distance")} == {"fewer than 8 queries"}
    assert registry.get(first.release_id).manifest.metrics["gate"]["slices"] == []


class Picky(Refresher):
    """Its gate refuses every head but the active one (``keeps``), or every head."""

    keeps = True

    def _judge(self, labels, fitted, previous, calibration, cuts, seed):
        report, decision = super()._judge(labels, fitted, previous, calibration, cuts, seed)
        if self.keeps and previous is not None and fitted.head is previous.head:
            return report, decision
        return report, replace(decision, passed=False, reasons=("REGRESSION: made up",))


@pytest.mark.parametrize("keeps", [True, False])
def test_a_refused_winner_is_followed_by_the_next_best_and_the_manifest_has_every_verdict(
    engine, world, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps: bool
):
    _add(engine, world, "train", range(6))
    _add(engine, world, "validation", range(12))
    _refresher(engine, world, tmp_path).run_once(now=NOW, seed=0)
    _add(engine, world, "train", range(6, 40))
    CatalogStore(engine).withdraw([7])
    monkeypatch.setattr(Picky, "keeps", keeps)
    picky = _refresher(engine, world, tmp_path, kind=Picky)
    due = [Due(Trigger.CORPUS, "1 withdrawn"), Due(Trigger.RANKINGS, "34 new rankings")]
    outcome = picky.run_once(now=NOW + timedelta(minutes=5), seed=0, due=due)
    record = ReleaseRegistry(engine).get(outcome.release_id)
    made = record.manifest.refresh
    assert made is not None and set(made.validation_map) == {"kept", "warm", "fresh"}
    order = sorted(made.validation_map, key=lambda start: -made.validation_map[start])
    assert order[0] != "kept"  # else nothing followed
    verdicts = record.manifest.metrics["gate"]["verdicts"]
    seen = order[: order.index("kept") + 1] if keeps else order
    assert [one["start"] for one in verdicts] == seen
    assert [one["passed"] for one in verdicts] == [keeps and start == "kept" for start in seen]
    assert all(one["reasons"] == ["REGRESSION: made up"] for one in verdicts if not one["passed"])
    assert (outcome.activated, outcome.start) == (keeps, Start.KEPT if keeps else Start(order[0]))
    assert record.state is (ReleaseState.ACTIVE if keeps else ReleaseState.REJECTED)


def test_lost_images_are_left_out_named_in_the_manifest_and_no_reason_to_refresh_again(engine, world, tmp_path: Path):
    _add(engine, world, "train", range(20))
    _add(engine, world, "validation", range(12))
    features = ArithmeticFeatures(world)
    features.lost, features.lost_prompts = {3, 9}, {"train 4"}
    features.lost_pictures = {"validation 2", "train 5"}  # their features are kept, which is enough to learn from
    outcome = _refresher(engine, world, tmp_path, features=features).run_once(now=NOW, seed=0)
    record = ReleaseRegistry(engine).get(outcome.release_id)
    assert outcome.activated and record.manifest.items == ITEMS - 2 and outcome.report.queries == 11
    left_out = record.manifest.metrics["left_out"]
    assert set(left_out["items"]) == {"3", "9"} and left_out["count"] == {"items": 2, "queries": 2}
    release = load_release(record.directory, expected=record.manifest)
    assert not {3, 9} & set(release.catalogue)
    observer = Observer(engine, "toy", "abu_plus_linear")
    assert observer.look() == Observed(32) and record.manifest.labels.queries == 32


@pytest.mark.parametrize(("lost", "error"), [("items", CorpusNotUsable), ("queries", LabelsNotUsable)])
def test_a_refresh_is_refused_where_many_images_are_lost(engine, world, tmp_path: Path, lost: str, error):
    _add(engine, world, "train", range(20))
    _add(engine, world, "validation", range(12))
    features = ArithmeticFeatures(world)
    if lost == "items":
        features.lost = set(range(4))
    else:
        features.lost_prompts = {f"train {number}" for number in range(4)}
    with pytest.raises(error, match="4 of .* are lost or broken"):
        _refresher(engine, world, tmp_path, features=features).run_once(now=NOW, seed=0)
    assert ReleaseRegistry(engine).list("toy") == []


def test_a_candidate_that_passed_and_whose_files_are_gone_does_not_hold_up_the_next_trainer(
    engine, world, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _add(engine, world, "train", range(20))
    _add(engine, world, "validation", range(12))
    registry, refresher = ReleaseRegistry(engine), _refresher(engine, world, tmp_path)
    with monkeypatch.context() as patch:  # a trainer that ended before it activated what had passed
        patch.setattr(Refresher, "_publish", lambda self, release_id, *_: registry.validate(release_id) is None)
        made = refresher.run_once(now=NOW, seed=0)
    with transaction(engine) as connection:
        connection.execute(text("UPDATE releases SET collected_at = now()"))
    assert settle_leftovers(registry, tmp_path / "releases", "toy") == (made.release_id,)
    record = registry.get(made.release_id)
    assert record.state is ReleaseState.REJECTED and "were removed on" in (record.reason or "")
    assert settle_leftovers(registry, tmp_path / "releases", "toy") == () and last_refresh(registry, "toy") is None


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
    assert record.metrics["labels"]["held_out_split"] == "test" and record.metrics["gate"]["fallback"] is None


def test_where_validation_queries_judge_the_manifest_says_so_and_why(engine, world, tmp_path: Path):
    _add(engine, world, "train", range(20))
    _add(engine, world, "validation", range(12))
    _add(engine, world, "test", range(3))
    record = ReleaseRegistry(engine).get(_refresher(engine, world, tmp_path).run_once(now=NOW, seed=0).release_id)
    assert record.manifest.refresh is not None and record.manifest.refresh.held_out_split == "validation"
    assert record.manifest.metrics["gate"]["fallback"].startswith("3 test queries are ranked, 10 are needed")


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


def test_after_a_rollback_a_changed_corpus_is_published_with_the_head_that_answers_and_a_new_one_only_when_asked_for(
    engine, world, tmp_path: Path
):
    _add(engine, world, "train", range(20))
    _add(engine, world, "validation", range(12))
    registry, observer = ReleaseRegistry(engine), Observer(engine, "toy", "abu_plus_linear")
    refresher = _refresher(engine, world, tmp_path, epochs=2, limits=LENIENT)
    work = TrainerWork(engine, "toy", tmp_path / "releases", observer, RefreshRule(8, timedelta(hours=1), timedelta(0)),
                       lambda: refresher, KeepRule())  # fmt: skip
    for number in range(2):
        assert work.run(observer.now(), [Due(Trigger.RANKINGS, "x")]) is not None, number
    older, newer = (one.release_id for one in registry.list("toy")[::-1])
    assert observer.look().rolled_back_from is None
    registry.rollback("toy", reason="cats look wrong", principal="ann")
    assert observer.look().rolled_back_from == newer
    _add(engine, world, "train", range(20, 40))
    assert work.run(observer.now()) is None
    CatalogStore(engine).withdraw([7])
    kept = work.run(observer.now())
    assert kept is not None and kept.activated and kept.start is Start.KEPT
    assert [one.trigger for one in kept.due] == [Trigger.CORPUS] and observer.look().rolled_back_from == newer
    heads = [load_head(registry.get(name).directory / HEAD).state_dict() for name in (older, kept.release_id)]
    assert all(torch.equal(tensor, heads[1][name]) for name, tensor in heads[0].items())
    assert work.run(observer.now()) is None
    RefreshRequests(engine).ask("toy", uuid.UUID(int=1), "ann", "try again")
    asked = work.run(observer.now())
    assert asked is not None and asked.activated and asked.start is not Start.KEPT
    assert observer.look().rolled_back_from is None
