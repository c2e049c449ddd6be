"""The demo's evidence of a swap: which release each answer named, and what failed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from byline.cli import demo_lookups
from byline.cli.demo_lookups import SteadyLookups
from byline.errors import NoActiveRelease


class SwappingClient:
    """Answers three times from r1, fails once, mixes releases once, then answers from r2."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.asked = 0

    def attribute(self, image: bytes, prompt: str, top_k: int) -> Any:
        self.asked += 1
        if self.asked == 4:
            raise NoActiveRelease("none")
        job, answer = ("r1", "r2") if self.asked == 5 else (("r1", "r1") if self.asked < 4 else ("r2", "r2"))
        return SimpleNamespace(job=SimpleNamespace(release=job), answer=SimpleNamespace(release=answer), release=answer)

    def close(self) -> None:
        """Nothing is open."""


def test_failed_and_mixed_answers_are_counted_and_a_release_counts_only_when_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demo_lookups, "Client", SwappingClient)
    with SteadyLookups("nowhere:1", "m", [(b"", "a cat")], interval_s=0.001) as lookups:
        assert lookups.wait_for_release("r2", 5, timeout_s=20)
        assert not lookups.wait_for_release("r3", 1, timeout_s=0.05)
    seen = lookups.summary()
    assert (seen["failed"], seen["mixed"], seen["by_release"]["r1"]) == (1, 1, 3)
    assert seen["lookups"] == sum(seen["by_release"].values()) + 1
    assert seen["errors"] == ["NO_ACTIVE_RELEASE: none"]
