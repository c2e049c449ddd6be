"""Kinds of queries: every query is in exactly one slice of a cut, and the cuts find what was planted."""

from __future__ import annotations

import numpy as np
import pytest

from byline.evaluation.head_slices import OTHER, creator_of_top, distance_thirds, prompt_clusters, slices


def test_slices_of_a_cut_add_up_to_the_whole_and_compare_within():
    rng = np.random.default_rng(0)
    head = rng.random(30)
    raw = head - 0.1
    names = ["b"] * 10 + [OTHER] * 5 + ["a"] * 15
    found = slices({"kind": names}, head, raw, head + 0.2, seed=0)
    assert [(part.name, part.queries) for part in found] == [("b", 10), ("a", 15), (OTHER, 5)]
    assert sum(part.head * part.queries for part in found) / 30 == pytest.approx(head.mean())
    assert all(part.gain.mean == pytest.approx(0.1) and part.gain.p_value < 0.01 for part in found)
    assert found[1].ceiling == pytest.approx(head[15:].mean() + 0.2)
    assert found[0].to_json()["best_raw"] == pytest.approx(raw[:10].mean())


def test_prompts_about_the_same_are_in_one_cluster_named_by_its_words():
    rng = np.random.default_rng(0)
    centres = np.eye(6)[:2] * 5
    which = rng.integers(0, 2, 60)
    text = (centres[which] + 0.1 * rng.normal(size=(60, 6))).astype(np.float32)
    prompts = [("a red cat (animal)" if w else "fast blue car (transport)") for w in which]
    found = prompt_clusters(text[:40], prompts[:40], text[40:], seed=0)
    assert len(set(found)) == 2
    for name, w in zip(found, which[40:], strict=True):
        assert ("cat" in name) == bool(w) and ("car" in name.split(", ")) == (not w)


def test_creators_of_few_queries_are_taken_together():
    tau = np.eye(8, dtype=np.float32)
    tau[1, 0] = 2.0
    tau[0, 5] = np.nan
    creators = ["Ann", "Bob", "Cid", "", "Ann", "Ann", "Ann", "Ann"]
    assert creator_of_top(tau, creators) == ["Ann", "Ann", OTHER, OTHER, "Ann", "Ann", "Ann", "Ann"]
    assert creator_of_top(tau, creators, smallest=1)[3] == "unknown"


def test_a_third_of_the_queries_is_near_and_a_third_far():
    rng = np.random.default_rng(0)
    train = rng.normal(size=(50, 12)).astype(np.float32)
    near = train[:10] + 0.01 * rng.normal(size=(10, 12))
    middle = train[10:20] + 0.8 * rng.normal(size=(10, 12))
    far = 3 * rng.normal(size=(10, 12))
    found = distance_thirds(train, np.concatenate([near, middle, far]).astype(np.float32))
    assert all(name.startswith("near") for name in found[:10])
    assert sum(name.startswith("far") for name in found) == 10
    assert sum(name.startswith("far") for name in found[20:]) >= 7
