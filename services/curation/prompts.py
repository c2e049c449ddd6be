"""Prompts from beside the corpus, and the near-duplicate group that each prompt belongs to for ever.

Why it exists: a prompt of a file or of a client may be a corpus caption in other words. If its query were trained on
while the caption's is tested on, the test would be worth nothing. So every prompt joins the group, and the split, of
what it nearly repeats; only a prompt like no other makes a group of its own, named by its own text.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from byline.errors import SettingsInvalid
from services.curation.plan import PlannedQuery, normalised, split_of

FloatArray = NDArray[np.float32]
#: Cosine of two prompts' text features from which they count as one.
SAME_PROMPT = 0.95
#: Live and file queries have seeds of their own, far from those of the corpus plan.
_FILE_SEEDS = 1 << 40
_SEED_MASK = (1 << 62) - 1


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; empty lines and those that begin with ``#`` are passed over. Raises ``SettingsInvalid``."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsInvalid(f"the prompt file {path} cannot be read: {error}", path=path) from error
    return list(dict.fromkeys(line.strip() for line in lines if line.strip() and not line.startswith("#")))


class PromptGroups:
    """Group and split of any prompt. ``features`` gives unit rows [n, d] of texts.

    ``known`` are prompts with the group and split they have: stored queries and corpus captions. A prompt that is
    assigned is known from then on, so that two new ones that repeat each other come together too.
    """

    def __init__(self, features: Callable[[Sequence[str]], FloatArray], known: Mapping[str, tuple[int, str]]) -> None:
        self._features = features
        self._known: dict[str, tuple[int, str]] = {}
        self._clashing: set[str] = set()
        for prompt, place in known.items():
            self._learn(normalised(prompt), place)
        self._rows: FloatArray | None = None
        self._places: list[tuple[int, str]] = []
        self._prompts = list(known)

    def of(self, prompt: str) -> tuple[int, str] | None:
        """(group, split). None if it repeats prompts of two splits: whichever it took, it would leak from the other."""
        text = normalised(prompt)
        if text in self._clashing:
            return None
        if text in self._known:
            return self._known[text]
        place: tuple[int, str] | None
        near = self._near(prompt)
        if not near:
            digest = hashlib.sha256(f"prompt/{text}".encode()).digest()
            group = int.from_bytes(digest[:8], "big") & _SEED_MASK
            place = (group, split_of(group))
        else:
            place = near[0] if len({split for _, split in near}) == 1 else None
        if place is None:
            self._clashing.add(text)
            return None
        self._learn(text, place)
        self._append(prompt, place)
        return place

    def _learn(self, text: str, place: tuple[int, str]) -> None:
        if self._known.setdefault(text, place)[1] != place[1]:
            self._clashing.add(text)

    def _near(self, prompt: str) -> list[tuple[int, str]]:
        """Places of the known prompts that this one nearly repeats, nearest first."""
        if self._rows is None:
            self._rows = self._features(self._prompts) if self._prompts else np.zeros((0, 0), np.float32)
            self._places = [self._known[normalised(known)] for known in self._prompts]
        if not len(self._rows):
            return []
        cosine = self._rows @ self._features([prompt])[0]
        found = [row for row in np.argsort(-cosine, kind="stable")[:50].tolist() if cosine[row] >= SAME_PROMPT]
        return [self._places[row] for row in found]

    def _append(self, prompt: str, place: tuple[int, str]) -> None:
        row = self._features([prompt])
        self._rows = row if self._rows is None or not len(self._rows) else np.concatenate([self._rows, row])
        self._places.append(place)


def without_leaks(
    plan: Iterable[PlannedQuery],
    features: Callable[[Sequence[str]], FloatArray],
    stored: Mapping[str, Collection[str]],
    at_once: int = 64,
) -> Iterator[PlannedQuery]:
    """Those of a plan that nearly repeat no stored prompt of another split; ``stored``: splits by prompt.

    Captions join groups by their words alone: that of a new item may say in other words what a stored query says. Its
    split is drawn by then, and may be the other one.
    """
    if not stored:
        yield from plan
        return
    rows = features(list(stored))
    elsewhere = {split: np.array([bool(set(found) - {split}) for found in stored.values()])
                 for split in ("train", "validation", "test")}  # fmt: skip
    waiting = iter(plan)
    while part := list(itertools.islice(waiting, at_once)):
        near = features([planned.prompt for planned in part]) @ rows.T >= SAME_PROMPT
        yield from (one for one, like in zip(part, near, strict=True) if not (like & elsewhere[one.split]).any())


def plan_of_file(prompts: Sequence[str], groups: PromptGroups, seed: int) -> Iterator[PlannedQuery]:
    """Every prompt in turn, round after round with other sampling seeds; those that would leak are passed over."""
    for round_ in range(1_000_000 if prompts else 0):
        order = np.random.default_rng([seed, round_, 1]).permutation(len(prompts))
        used = 0
        for number in order.tolist():
            place = groups.of(prompts[number])
            if place is not None:
                used += 1
                key = _FILE_SEEDS + seed * 1_000_000 + round_ * len(prompts) + number
                yield PlannedQuery(prompts[number], key, *place, source="file")
        if not used:
            return


def live_seed(image_sha256: str) -> int:
    """What stands for the sampling seed of a picture that a client sent: the same picture is the same query."""
    return int(image_sha256[:15], 16) | (1 << 61)


def interleaved(*plans: Iterable[PlannedQuery]) -> Iterator[PlannedQuery]:
    """One of each plan in turn, as long as it lasts: no source starves another."""
    waiting = [iter(plan) for plan in plans]
    while waiting:
        for plan in list(waiting):
            found = next(plan, None)
            if found is None:
                waiting.remove(plan)
            else:
                yield found
