"""Item ids: stable, 63 bits, their own group where none is given."""

from __future__ import annotations

import pytest

from byline.catalog.items import Item, derive_item_id


def test_an_item_without_a_group_is_its_own_group() -> None:
    assert Item(7, "a cat").near_duplicate_group == 7
    assert Item(7, "a cat", near_duplicate_group=3).near_duplicate_group == 3


def test_derived_ids_are_stable_and_differ_between_corpora() -> None:
    assert derive_item_id("a", "00" * 32) == derive_item_id("a", "00" * 32)
    assert derive_item_id("a", "00" * 32) != derive_item_id("b", "00" * 32)
    assert 0 <= derive_item_id("a", "ff" * 32) < 2**63


@pytest.mark.parametrize("item_id", [-1, 2**63])
def test_an_id_that_the_database_cannot_hold_is_refused(item_id: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        Item(item_id, "a cat")
