import itertools

import numpy as np

from byline.catalog.items import Item
from services.curation.plan import choose_candidates, plan_queries, prompt_groups, split_of


def corpus(n: int = 60) -> list[Item]:
    return [Item(item_id=i, caption=f"thing {i % 25}", near_duplicate_group=i // 3) for i in range(n)]


def test_captions_tied_by_a_near_duplicate_group_are_never_on_two_sides_of_a_split() -> None:
    items = corpus()
    groups = prompt_groups(items)
    splits = {p.prompt: p.split for p in itertools.islice(plan_queries(items, 0), 200)}
    for one in items:
        for other in items:
            if one.near_duplicate_group == other.near_duplicate_group or one.caption == other.caption:
                assert groups[one.caption] == groups[other.caption]
                if one.caption in splits and other.caption in splits:
                    assert splits[one.caption] == splits[other.caption]


def test_the_plan_is_a_function_of_corpus_and_seed() -> None:
    items = [Item(item_id=i, caption=f"thing {i}", near_duplicate_group=i) for i in range(40)]
    first = list(itertools.islice(plan_queries(items, 7), 100))
    again = list(itertools.islice(plan_queries(list(reversed(items)), 7), 100))
    assert first == again
    assert len({(p.prompt, p.seed) for p in first}) == 100
    assert first != list(itertools.islice(plan_queries(items, 8), 100))


def test_every_group_is_visited_once_before_any_is_visited_twice() -> None:
    items = [Item(item_id=i, caption=f"thing {i}", near_duplicate_group=i) for i in range(40)]
    first_round = list(itertools.islice(plan_queries(items, 0), 40))
    assert len({p.near_duplicate_group for p in first_round}) == 40


def test_the_splits_have_the_stated_shares() -> None:
    counts = {name: 0 for name in ("train", "validation", "test")}
    for group in range(5000):
        counts[split_of(group)] += 1
    assert abs(counts["train"] / 5000 - 0.70) < 0.03
    assert abs(counts["test"] / 5000 - 0.18) < 0.03


def test_candidates_are_the_nearest_and_a_random_share_from_outside_them() -> None:
    rng = np.random.default_rng(0)
    ids = np.arange(1000, 1500)
    features = rng.standard_normal((500, 8)).astype(np.float32)
    query = features[42] + 0.01
    chosen = choose_candidates(query, ids, features, count=50, explore_share=0.2, seed=1)
    nearest = choose_candidates(query, ids, features, count=40, explore_share=0.0, seed=1)
    assert len(set(chosen.tolist())) == 50
    assert 1042 in nearest and set(nearest.tolist()) <= set(chosen.tolist())
    other = choose_candidates(query, ids, features, count=50, explore_share=0.2, seed=2)
    assert len(set(chosen.tolist()) ^ set(other.tolist())) > 0
    shuffled = rng.permutation(500)
    again = choose_candidates(query, ids[shuffled], features[shuffled], count=40, explore_share=0.0, seed=1)
    assert np.array_equal(again, nearest)
