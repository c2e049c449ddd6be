"""Stage ``estimate``: one gradient of the query against the sketches of the whole corpus (tier ESTIMATED).

Why it exists: the student guesses, the exact teacher measures a few dozen candidates in minutes; this stage comes
near the teacher for *every* item in about a second. All of an answer comes from the release the lookup pinned: its
basis gives the query's sketch, its index the items', its catalogue their captions.

    tau(item) = < mean over replicates of sketch(query), sketch(item) > / corpus size

or, where the release has the items' token gradients, the first-order score itself; of a large corpus for those that
the sketches put first.

The standard error is the one of the query's gradient, from replicates of its noise draws that share nothing. That
of the items' gradients is not in it: they were computed once, and their error is the same for every query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from byline.catalog.blobs import BlobStore
from byline.errors import InvalidRequest, NoActiveRelease, StageInputMissing, TierNotAvailable
from byline.index import VectorIndex
from byline.index.protocol import NO_ITEM
from byline.jobs import Claim, Job, Stage
from byline.jobs.runner import Beat, Outcome
from byline.jobs.store import JobStore
from byline.releases.holder import ReleaseHolder
from byline.releases.loader import Release, load_release
from byline.releases.registry import ReleaseRegistry
from byline.releases.sketches import ReleaseSketches
from byline.security.decoding import decode_untrusted
from byline.security.signing import NOT_SIGNED, Keyring
from byline.teachers import TeacherQuery
from byline.teachers.token_gradients import TokenGradients
from services.workers.answer import Answer, copies_apart, end_of_groups, estimated_answer, item_ids_of
from services.workers.group_search import DEEPEST, searched
from services.workers.teacher_bench import TeacherBench
from services.workers.withdrawal import refuse_withdrawn

#: Token gradients scanned for one estimate: about 1.5 s on one core, at the 0.15 ms an item measured on the demo.
SCANNED = 10_000

#: The near-duplicate groups [n] of items [n].
GroupsOf = Callable[[NDArray[np.int64]], NDArray[np.int64]]


@dataclass(frozen=True)
class Estimate:
    """What the sketches say of one item: τ (higher = more influential) and its standard error (NaN if unknown)."""

    item_id: int
    tau: float
    standard_error: float


def best_estimates(
    sketch: NDArray[np.float32], index: VectorIndex, corpus_size: int, k: int, exclude: NDArray[np.int64],
    groups_of: GroupsOf | None = None,
) -> list[Estimate]:  # fmt: skip
    """The items of the ``k`` near-duplicate groups of largest τ that are not in ``exclude``, best first, ties by item
    id; fewer if fewer remain, or if one group fills the deepest search. Without ``groups_of`` the ``k`` best items.

    ``sketch`` [replicates, d] of the query; see the module for the formula.
    """
    replicates = np.asarray(sketch, dtype=np.float64)
    asked = replicates.mean(axis=0, dtype=np.float64).astype(np.float32)[None, :]

    def search(depth: int) -> list[int]:
        _, found = index.search(asked, depth, exclude)
        kept: list[int] = found[0][found[0] != NO_ITEM].tolist()
        return kept

    ids = np.array(searched(search, None if groups_of is None else partial(_groups, groups_of), k), dtype=np.int64)
    tau = replicates @ index.vectors(ids).astype(np.float64).T / corpus_size  # [replicates, n]
    count = len(replicates)
    error = tau.std(axis=0, ddof=1) / np.sqrt(count) if count > 1 else np.full(len(ids), np.nan)
    mean = tau.mean(axis=0)
    order = _listed(np.lexsort((ids, -mean)), ids, k, groups_of)
    return [Estimate(int(ids[n]), float(mean[n]), float(error[n])) for n in order]


def _groups(groups_of: GroupsOf, item_ids: Sequence[int]) -> list[int]:
    found: list[int] = groups_of(np.array(item_ids, dtype=np.int64)).tolist()
    return found


def _listed(
    order: NDArray[np.int64], item_ids: NDArray[np.int64], k: int, groups_of: GroupsOf | None
) -> NDArray[np.int64]:
    """Of places in ``item_ids``, best first, those that hold the first ``k`` groups."""
    if groups_of is None:
        return order[:k]
    order = order[: DEEPEST * k]
    return order[: end_of_groups(groups_of(item_ids[order]).tolist(), k)]


def best_by_tokens(
    directions: NDArray[np.float32], tokens: TokenGradients, allowed: NDArray[np.bool_], corpus_size: int, k: int,
    groups_of: GroupsOf | None = None,
) -> list[Estimate]:  # fmt: skip
    """``best_estimates`` by token gradients: ``directions`` [replicates, r, columns] of the query, ``allowed`` [n].

    Everything allowed is scored by the mean of the replicates; only the best by each of them, for their error.
    """
    rows = np.flatnonzero(allowed)
    mean = tokens.scores(directions.mean(axis=0, dtype=np.float64).astype(np.float32)[None], rows)[0]
    order = _listed(np.lexsort((tokens.item_ids[rows], -mean)), tokens.item_ids[rows], k, groups_of)
    best = rows[order]
    tau = tokens.scores(directions, best).astype(np.float64) / corpus_size  # [replicates, k]
    error = tau.std(axis=0, ddof=1) / np.sqrt(len(tau)) if len(tau) > 1 else np.full(len(best), np.nan)
    return [
        Estimate(int(tokens.item_ids[row]), float(score) / corpus_size, float(e))
        for row, score, e in zip(best, mean[order], error, strict=True)
    ]


def shortlisted(
    sketch: NDArray[np.float32], index: VectorIndex, tokens: TokenGradients, exclude: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Which items [n] the token gradients are asked about: all that are not in ``exclude``, of a corpus of up to
    ``SCANNED`` items; of a larger one those that the sketches put first."""
    allowed = ~np.isin(tokens.item_ids, exclude)
    if allowed.sum() <= SCANNED:
        return allowed
    _, found = index.search(sketch.mean(axis=0, dtype=np.float64).astype(np.float32)[None, :], SCANNED, exclude)
    return allowed & np.isin(tokens.item_ids, found[0])


class OpenReleases:
    """The releases this child answers estimates from: the active one and the one before stay open."""

    def __init__(
        self, registry: ReleaseRegistry, model_id: str, device: str = "cpu", keyring: Keyring = NOT_SIGNED
    ) -> None:
        self._keyring = keyring
        self._registry = registry
        self._model_id = model_id
        self._device = device
        self._holder: ReleaseHolder[Release] = ReleaseHolder(self._load, lambda: registry.active(model_id))

    @contextmanager
    def pinned(self, release_id: str | None) -> Iterator[Release]:
        """The release a job is pinned to, verified, unchanged until the block ends.

        Raises NoActiveRelease for a job without one, and what opening it raises.
        """
        if release_id is None:
            raise NoActiveRelease("the job is pinned to no release", model_id=self._model_id)
        self._holder.refresh()
        with self._holder.pinned(release_id) as release:
            yield release

    def _load(self, release_id: str) -> Release:
        record = self._registry.get(release_id)
        return load_release(record.directory, expected=record.manifest, device=self._device, keyring=self._keyring)


class EstimateStage:
    """Turns a claim on stage ``estimate`` into an ESTIMATED answer."""

    def __init__(
        self,
        *,
        store: JobStore,
        releases: OpenReleases,
        bench: TeacherBench,
        blobs: BlobStore,
        withdrawn: Callable[[], Iterable[int]],
        draws: int,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._releases = releases
        self._bench = bench
        self._blobs = blobs
        self._withdrawn = withdrawn
        self._draws = draws
        self._clock = clock

    def __call__(self, claim: Claim, beat: Beat) -> Outcome:
        """Search the whole corpus. Raises typed errors; JobCancelled, LeaseLost or a stop come out of ``beat``."""
        job = claim.job
        if job.image_sha256 is None:
            raise InvalidRequest("query", "an estimate needs the image; a ready embedding can only be retrieved")
        retrieved = self._retrieved(job)
        self._bench.require_revision(retrieved["model_revision"], "the retrieved answer")
        with self._releases.pinned(job.release_id) as release:
            if release.sketches is None:
                raise no_sketches(release.release_id)
            answer = self._answer(job, job.image_sha256, retrieved, release, release.sketches, beat)
        named = item_ids_of(answer)
        return Outcome(answer, also=lambda connection: refuse_withdrawn(connection, named))

    def _answer(
        self, job: Job, image_sha256: str, retrieved: Answer, release: Release, sketches: ReleaseSketches, beat: Beat
    ) -> Answer:
        begun = self._clock()
        beat.progress(0, self._draws)
        query = TeacherQuery(decode_untrusted(self._blobs.get(image_sha256)), job.prompt)
        decoded = self._clock()
        teacher, tokens = self._bench.sketch_teacher(sketches.basis, sketches.tokens, self._draws, check=beat.check)
        loaded = self._clock()
        asked = teacher.ask(query, check=beat.check)
        sketched = self._clock()
        beat.progress(self._draws, self._draws)
        beat.check()
        # Read as late as possible: what is withdrawn by now is filtered before the best are chosen.
        exclude = np.fromiter(self._withdrawn(), dtype=np.int64)
        size = teacher.settings.corpus_size
        groups_of = None if copies_apart(retrieved) else release.catalogue.groups
        if tokens is not None and asked.directions is not None:
            allowed = shortlisted(asked.sketch, sketches.index, tokens, exclude)
            found = best_by_tokens(asked.directions, tokens, allowed, size, job.top_k, groups_of)
        else:
            found = best_estimates(asked.sketch, sketches.index, size, job.top_k, exclude, groups_of)
        done = self._clock()
        timings = {
            "decode": 1e3 * (decoded - begun),
            "load": 1e3 * (loaded - decoded),
            "gradient": 1e3 * (sketched - loaded),
            "search": 1e3 * (done - sketched),
            "total": 1e3 * (done - begun),
        }
        return estimated_answer(
            retrieved,
            [(release.catalogue[one.item_id], one.tau, one.standard_error) for one in found],
            release_id=release.release_id,
            model_revision=self._bench.model_revision,
            teacher_id=teacher.teacher_id,
            draws=self._draws,
            timings_ms=timings,
        )

    def _retrieved(self, job: Job) -> Answer:
        found = self._store.results(job.id).get(Stage.LOOKUP)
        if found is None:
            raise StageInputMissing(f"job {job.id} has no retrieved answer before its estimate", job_id=job.id)
        return dict(found.result)


def no_sketches(release_id: str) -> TierNotAvailable:
    """The refusal of an estimate by a release that carries no sketches."""
    return TierNotAvailable(
        "options.tier",
        f"release {release_id} has no sketches, which ESTIMATED needs; ask for RETRIEVED or VERIFIED",
        release_id=release_id,
    )
