"""Features asked for again are the very same ones, and memory stays bounded."""

from __future__ import annotations

import numpy as np
import pytest

from services.workers.feature_memory import FeatureMemory, Key


def row(value: float) -> np.ndarray:
    return np.full(3, value, dtype=np.float32)


def key(image: str = "i", prompt: str = "p", encoders: str = "e") -> Key:
    return image, prompt, encoders


def test_a_known_query_is_not_encoded_again() -> None:
    memory, made = FeatureMemory(), []

    def make() -> np.ndarray:
        made.append(1)
        return row(1.0)

    first, second = memory.get(key(), make), memory.get(key(), make)
    assert first is second and len(made) == 1


@pytest.mark.parametrize("other", [key(image="j"), key(prompt="q"), key(encoders="f")])
def test_another_picture_prompt_or_encoder_is_another_query(other: Key) -> None:
    memory = FeatureMemory()
    memory.get(key(), lambda: row(1.0))
    assert memory.get(other, lambda: row(2.0))[0] == 2.0


def test_the_row_unused_for_longest_is_dropped() -> None:
    memory = FeatureMemory(rows=2)
    for name in ("a", "b", "a", "c"):
        memory.get(key(name), lambda: row(0.0))
    assert len(memory) == 2
    assert memory.get(key("a"), lambda: row(9.0))[0] == 0.0
    assert memory.get(key("b"), lambda: row(9.0))[0] == 9.0


def test_what_could_not_be_made_is_not_kept_and_nobody_can_change_what_is() -> None:
    memory = FeatureMemory()
    with pytest.raises(OSError):
        memory.get(key(), lambda: (_ for _ in ()).throw(OSError("broken image")))
    kept = memory.get(key(), lambda: row(1.0))
    with pytest.raises(ValueError):
        kept[0] = 5.0
