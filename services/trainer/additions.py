"""New items into the deltas of the releases that answer, within seconds of being added and without a new head.

Why it exists: a refresh takes minutes and comes when it is due; an item that was added must be found now. So beside
the trainer's loop a thread hears of additions, encodes them in small blocks, embeds them with the head of the active
release (and of the one a rollback would bring back), and puts them into those releases' deltas. The features are kept
where the next refresh looks for them: it contains the items without encoding them again. Several such threads, in
processes of their own (``python -m services.trainer --additions``), share the work by locking blocks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from sqlalchemy import Engine, text

from byline.catalog.items import Item
from byline.catalog.store import CatalogStore
from byline.db.listen import ADDITIONS, RELEASES, Listener
from byline.db.session import transaction
from byline.errors import BylineError, DatabaseUnavailable
from byline.ranker.head import Head
from byline.releases.delta import DeltaStore
from byline.releases.loader import load_release
from byline.releases.manifest import ReleaseManifest
from byline.releases.registry import ReleaseRegistry
from byline.security.signing import NOT_SIGNED, Keyring
from byline.telemetry import get_logger

log = get_logger(__name__)

#: Items encoded at a time: found after a second or so even where a thousand come at once.
BLOCK = 32
#: Releases kept open at most: the one that answers, or is about to, and the one a rollback would bring back.
_OPEN = 2
#: A release whose delta could not be kept is tried again after so long (seconds).
_AGAIN_S = 30.0
_TRY_LOCK = text("SELECT pg_try_advisory_xact_lock(hashtextextended(:key, 7))")


class ItemEncoder(Protocol):
    """Features of a few items; ``byline.rankings.features.LabelFeatures`` is one."""

    def encode_items(self, items: Sequence[Item]) -> npt.NDArray[np.float32]:
        """[n, in] in the order of ``items``."""
        ...


@dataclass(frozen=True)
class _Target:
    """A release whose delta is kept: its head, and what it contains itself."""

    head: Head
    held: frozenset[int]
    encoder: ItemEncoder


class Additions:
    """Keeps the deltas of one model. ``encoder_of`` gives the encoders of a release, FeatureMismatch if it has others.

    For one thread; several processes may each have one.
    """

    def __init__(
        self,
        engine: Engine,
        model_id: str,
        encoder_of: Callable[[ReleaseManifest], ItemEncoder],
        *,
        block: int = BLOCK,
        keyring: Keyring = NOT_SIGNED,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keyring = keyring
        self._engine = engine
        self._model_id = model_id
        self._encoder_of = encoder_of
        self._block = block
        self._catalog = CatalogStore(engine)
        self._registry = ReleaseRegistry(engine)
        self._deltas = DeltaStore(engine)
        self._targets: dict[str, _Target] = {}
        self._unusable: set[int] = set()
        self._clock = clock
        self._failed: dict[str, float] = {}

    def catch_up_all(self, stop: Callable[[], bool] = lambda: False) -> int:
        """Bring the deltas of the active release and the one before up to date; how many items were embedded.

        A release that cannot be used is logged and left for the next time.
        """
        active = self._registry.active(self._model_id)
        if active is None:
            return 0
        done = 0
        wanted = [active.release_id, *filter(None, [active.previous_release_id])]
        for release_id in wanted:
            if self._clock() - self._failed.get(release_id, -_AGAIN_S) < _AGAIN_S:
                continue
            try:
                done += self.catch_up(release_id, stop)
            except DatabaseUnavailable:
                raise
            except BylineError as error:
                self._failed[release_id] = self._clock()
                log.warning("delta_not_kept", release_id=release_id, reason=error.reason, error=error.message)
        return done

    def catch_up(self, release_id: str, stop: Callable[[], bool] = lambda: False) -> int:
        """Embed what the corpus has and release and delta have not; how many items were embedded by this process.

        Raises what opening the release or its encoders raises. When it returns, and ``stop()`` did not end it, all that
        was in the corpus at its beginning can be found.
        """
        corpus_id = self._catalog.model(self._model_id).corpus_id
        target = self._target(release_id)  # also where nothing waits: the next item must not wait for encoders
        state = self._deltas.state(release_id)
        if state.corpus_sequence == self._catalog.sequence(corpus_id):
            return 0
        now, listed = self._catalog.added_since(corpus_id, state.corpus_sequence)
        done = 0
        while not stop():
            held = target.held | self._deltas.ids(release_id) | self._unusable
            waiting = [(sequence, item_id) for sequence, item_id in listed if item_id not in held]
            if not waiting:
                self._deltas.add(release_id, [], _nothing(target.head), now)
                break
            found = self._one_block(release_id, target, waiting)
            done += found
            if not found:  # the rest is in other hands
                time.sleep(0.05)
                gone = self._catalog.withdrawn(corpus_id)
                listed = [(sequence, item_id) for sequence, item_id in listed if item_id not in gone]
        if done:
            log.info("items_added_to_delta", release_id=release_id, items=done)
        return done

    def _one_block(self, release_id: str, target: _Target, waiting: Sequence[tuple[int, int]]) -> int:
        for start in range(0, len(waiting), self._block):
            part = waiting[start : start + self._block]
            ids = [item_id for _, item_id in part]
            with self._mine(f"{release_id}:{ids[0]}") as mine:
                if mine:
                    # Of a sequence that is complete up to here; the rest of it may be in other hands.
                    covered = part[0][0] - 1 if start == 0 else -1
                    return self._embed(release_id, target, ids, covered)
        return 0

    def _embed(self, release_id: str, target: _Target, ids: Sequence[int], covered: int) -> int:
        known = self._catalog.by_ids(ids)
        gone = self._withdrawn(ids)
        items = [known[item_id] for item_id in ids if item_id in known and item_id not in gone]
        rows, usable = self._features(target.encoder, items)
        embeddings = target.head.embed_items(rows) if len(usable) else _nothing(target.head)
        self._deltas.add(release_id, [item.item_id for item in usable], embeddings, covered)
        # Withdrawn meanwhile, or broken: not to be waited for.
        self._unusable.update(set(ids) - {item.item_id for item in usable})
        return len(ids)

    def _features(self, encoder: ItemEncoder, items: Sequence[Item]) -> tuple[npt.NDArray[np.float32], list[Item]]:
        """Rows of the items that can be encoded. One whose image is broken or gone does not hold up the others."""
        if not items:
            return np.empty((0, 0), np.float32), []
        try:
            return encoder.encode_items(items), list(items)
        except BylineError as error:
            if len(items) == 1:
                log.error("item_not_encoded", item_id=items[0].item_id, reason=error.reason, error=error.message)
                self._unusable.add(items[0].item_id)
                return np.empty((0, 0), np.float32), []
        parts = [self._features(encoder, [item]) for item in items]
        kept = [rows for rows, usable in parts if usable]
        return (np.concatenate(kept) if kept else np.empty((0, 0), np.float32)), [i for _, use in parts for i in use]

    def _withdrawn(self, ids: Sequence[int]) -> frozenset[int]:
        with transaction(self._engine) as connection:
            return self._catalog.withdrawn_among(connection, ids)

    def _target(self, release_id: str) -> _Target:
        target = self._targets.pop(release_id, None)
        if target is None:
            record = self._registry.get(release_id)
            encoder = self._encoder_of(record.manifest)
            release = load_release(record.directory, expected=record.manifest, keyring=self._keyring)
            target = _Target(release.head, frozenset(release.catalogue), encoder)
        self._targets[release_id] = target  # last used last
        while len(self._targets) > _OPEN:
            del self._targets[next(iter(self._targets))]
        return target

    @contextmanager
    def _mine(self, key: str) -> Iterator[bool]:
        """Whether this process has the block; the lock ends with the block, or with the process."""
        with transaction(self._engine) as connection:
            yield bool(connection.execute(_TRY_LOCK, {"key": key}).scalar())


class AdditionsThread(threading.Thread):
    """Hears of additions and activations, looks every ``poll_s`` all the same, and catches up."""

    def __init__(
        self, additions: Callable[[], Additions], database_url: str, stop: threading.Event, poll_s: float = 2.0
    ) -> None:
        """``additions`` is called on this thread, once: encoders take seconds to load."""
        super().__init__(name="byline-additions", daemon=True)
        self._make = additions
        self._database_url = database_url
        self._halt = stop
        self._poll_s = poll_s
        self._wake = threading.Event()

    def run(self) -> None:
        """Until stopped. What goes wrong is logged and tried again."""
        Listener(
            self._database_url, [ADDITIONS, RELEASES], self._halt, lambda _channel, _payload: self._wake.set(),
            self._wake.set,
        ).start()  # fmt: skip
        additions: Additions | None = None
        while not self._halt.is_set():
            self._wake.clear()
            try:
                additions = additions or self._make()
                additions.catch_up_all(self._halt.is_set)
            except BylineError as error:
                log.warning("additions_wait", reason=error.reason, error=error.message)
            except Exception:  # the thread must live: nobody else would notice that items are not found any more
                log.exception("additions_failed")
            self._sleep()

    def _sleep(self) -> None:
        deadline = time.monotonic() + self._poll_s
        while not self._halt.is_set() and (left := deadline - time.monotonic()) > 0:
            if self._wake.wait(min(left, 0.5)):
                return


def _nothing(head: Head) -> npt.NDArray[np.float32]:
    return np.empty((0, head.config.embedding_dim), np.float32)
