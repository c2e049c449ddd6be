import hashlib
import itertools
from typing import Any

from byline.catalog.items import Item
from services.curation.plan import PlannedQuery, plan_queries, prompt_groups, split_of


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


def first_round(items: list[Item], **arguments: Any) -> list[PlannedQuery]:
    """Every group once, as far as it may be used."""
    return list(itertools.islice(plan_queries(items, 0, **arguments), len(set(prompt_groups(items).values()))))


def thing(number: int, group: int) -> Item:
    return Item(item_id=number, caption=f"thing {number}", near_duplicate_group=group)


def test_the_plan_without_stored_splits_is_the_one_the_snapshot_was_made_from() -> None:
    planned = list(itertools.islice(plan_queries(corpus(), 3), 12))
    text = ";".join(f"{p.prompt},{p.seed},{p.near_duplicate_group},{p.split}" for p in planned)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "cda110da1f582a9e"


def test_a_stored_group_keeps_its_split_when_an_added_item_renames_it() -> None:
    items = [thing(n, n) for n in range(1000, 1040)]
    before = {p.prompt: p.split for p in first_round(items)}
    stored = {prompt: {split} for prompt, split in before.items()}
    # Twenty items come with smaller ids: each shares a caption, and so names the group from now on.
    added = [Item(item_id=n, caption=f"thing {1000 + n}") for n in range(20)]
    redrawn = {p.prompt: p.split for p in first_round([*items, *added])}
    assert redrawn != before
    assert {p.prompt: p.split for p in first_round([*items, *added], stored=stored)} == before


def test_withdrawing_the_item_that_ties_two_captions_does_not_untie_their_splits() -> None:
    items = [thing(n, n) for n in range(40)]
    ties = [Item(item_id=100 + n, caption=f"thing {n}", near_duplicate_group=n + 20) for n in range(20)]
    planned = list(itertools.islice(plan_queries([*items, *ties], 0, withdrawn={tie.item_id for tie in ties}), 200))
    splits = {p.prompt: p.split for p in planned}
    assert len(splits) == 40
    assert all(splits[f"thing {n}"] == splits[f"thing {n + 20}"] for n in range(20))


def test_a_caption_of_withdrawn_items_only_is_never_used() -> None:
    items = [thing(0, 0), thing(1, 0), thing(2, 2), Item(item_id=3, caption="thing 2", near_duplicate_group=2)]
    prompts = {p.prompt for p in itertools.islice(plan_queries(items, 0, withdrawn={0, 2}), 50)}
    assert prompts == {"thing 1", "thing 2"}
    assert list(plan_queries(items, 0, withdrawn={0, 1, 2, 3})) == []


def test_a_group_whose_stored_splits_disagree_gets_no_more_queries() -> None:
    items = [thing(0, 0), thing(1, 1), thing(2, 2), Item(item_id=3, caption="thing 0", near_duplicate_group=1)]
    stored = {"thing 0": {"train"}, "thing 1": {"test"}}
    assert {p.prompt for p in itertools.islice(plan_queries(items, 0, stored), 50)} == {"thing 2"}
    one_caption = {"thing 2": {"train", "test"}}
    assert "thing 2" not in {p.prompt for p in itertools.islice(plan_queries(items, 0, one_caption), 50)}


def test_captions_of_the_same_words_share_a_split_whatever_their_case_and_punctuation() -> None:
    spoken = [Item(item_id=n, caption=f"A red thing, {n}!", near_duplicate_group=n) for n in range(40)]
    again = [Item(item_id=100 + n, caption=f"a  red thing {n}", near_duplicate_group=100 + n) for n in range(40)]
    planned = itertools.islice(plan_queries([*spoken, *again], 0), 80)
    splits = {p.prompt: p.split for p in planned}
    assert len(splits) == 80
    assert all(splits[one.caption] == splits[other.caption] for one, other in zip(spoken, again, strict=True))


def test_a_later_caption_takes_the_split_of_the_stored_query_whose_words_it_has() -> None:
    items = [thing(n, n) for n in range(40)]
    other = {p.prompt: "validation" if p.split == "train" else "train" for p in first_round(items)}
    live = {f"{prompt.upper()}?": {split} for prompt, split in other.items()}
    assert {p.prompt: p.split for p in first_round(items, stored=live)} == other
