"""Stage ``lookup``: the student's answer in milliseconds (tier RETRIEVED).

Why it exists: image and prompt → features → the head's embedding → index search without withdrawn items.
Everything of one answer comes from one release, the one pinned by the claim, whatever is swapped meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection

from byline.catalog.blobs import BlobStore
from byline.errors import InvalidRequest, ItemWithdrawn, ModelMismatch
from byline.jobs import Claim, Job, Tier
from byline.jobs.runner import Beat, Outcome
from byline.security.decoding import decode_untrusted
from services.workers.answer import end_of_groups, group_ranks, item_ids_of, retrieved_answer, retrieved_influence
from services.workers.feature_memory import FeatureMemory
from services.workers.group_search import searched
from services.workers.withdrawal import WithdrawnItems, refuse_withdrawn

if TYPE_CHECKING:
    from byline.catalog.items import Item
    from byline.releases.delta_view import Delta, Deltas
    from byline.releases.loader import Hit, Release
    from services.workers.serving import Served, Serving


#: What a job's payload says where each copy is to be listed by itself.
APART = "apart"


class LookupStage:
    """Turns a claim on stage ``lookup`` into a RETRIEVED answer."""

    def __init__(
        self,
        *,
        serving: Serving,
        blobs: BlobStore,
        withdrawn: WithdrawnItems,
        max_image_bytes: int,
        max_image_pixels: int,
        clock: Callable[[], float],
        deltas: Deltas | None = None,
    ) -> None:
        """``deltas``: what was added since each release was built; None where nothing ever is."""
        self._deltas = deltas
        self._serving = serving
        self._blobs = blobs
        self._withdrawn = withdrawn
        self._max_image_bytes = max_image_bytes
        self._max_image_pixels = max_image_pixels
        self._clock = clock
        self._features = FeatureMemory()

    def __call__(self, claim: Claim, beat: Beat) -> Outcome:
        """Answer from the release the claim pinned. Raises typed errors; see each step."""
        job = claim.job
        with self._serving.pinned(job.release_id) as served:
            _require_model(job, served.release)
            return self._answer(job, served, beat)

    def _answer(self, job: Job, served: Served, beat: Beat) -> Outcome:
        release = served.release
        timings: dict[str, float] = {}
        begun = self._clock()
        embedding, evidence, distance = self._embedding(job, served, timings)
        beat.check()
        wanted = job.top_k if job.tier is Tier.RETRIEVED else max(job.top_k, job.candidates)
        searching = self._clock()
        # Probabilities look at a query's whole head of the list, whatever part of it was asked for.
        calibrator = served.calibrator
        delta = None if self._deltas is None else self._deltas.of(release.release_id)
        apart = job.payload.get("copies") == APART
        hits = self._found(release, delta, embedding, wanted, calibrator.depth, apart)
        groups = _groups(hits, release, delta)
        listed, ranks = end_of_groups(groups, wanted, apart), group_ranks(groups, apart)
        scores = [hit.score for hit in hits]
        probabilities = calibrator.probabilities(scores)
        timings["search"] = 1e3 * (self._clock() - searching)
        timings["total"] = 1e3 * (self._clock() - begun)
        answer = retrieved_answer(
            [
                retrieved_influence(
                    _item(hits[n], release, delta), rank=ranks[n], cosine=scores[n], probability=probabilities[n]
                )
                for n in range(listed)
            ],
            top_k=job.top_k,
            release_id=release.release_id,
            model_revision=release.manifest.model_revision,
            not_attributable=not calibrator.attributes(scores, evidence),
            noise_floor=calibrator.noise_floor(evidence is not None),
            timings_ms=timings,
            evidence=evidence,
            evidence_floor=calibrator.evidence_floor,
            apart=apart,
            delta_sequence=0 if delta is None else delta.state.sequence,
            corpus_sequence=None if delta is None or delta.state.corpus_sequence < 0 else delta.state.corpus_sequence,
            labelled_distance=distance,
            labelled_distance_limit=None if distance is None or release.labelled is None else release.labelled.limit,
        )
        named = item_ids_of(answer)
        return Outcome(answer, also=lambda connection: self._refuse(connection, named), named=named)

    def _found(
        self, release: Release, delta: Delta | None, embedding: NDArray[np.float32], wanted: int, depth: int,
        apart: bool,
    ) -> list[Hit]:  # fmt: skip
        """The best items of release and delta, at least ``depth``, and enough of them to hold ``wanted`` groups."""
        withdrawn, added = self._withdrawn.ids(), None if delta is None else delta.index

        def search(k: int) -> list[Hit]:
            return release.search_embedding(embedding, k, withdrawn, added)

        return searched(search, None if apart else lambda hits: _groups(hits, release, delta), wanted, depth)

    def _refuse(self, connection: Connection, named: Sequence[int]) -> None:
        try:
            refuse_withdrawn(connection, named)
        except ItemWithdrawn:
            self._withdrawn.changed()  # the next attempt must not meet the same set
            raise

    def _embedding(
        self, job: Job, served: Served, timings: dict[str, float]
    ) -> tuple[NDArray[np.float32], float | None, float | None]:
        """The query's embedding [embedding_dim], the client's own or made from its image and prompt, its evidence and
        its distance to the nearest labelled query (each None where there is none)."""
        if job.embedding is not None:
            return _ready_embedding(job, served.release), None, None
        if job.image_sha256 is None:
            raise InvalidRequest("query", "has neither an image nor an embedding")
        sha256 = job.image_sha256
        decoded = begun = self._clock()

        def encode() -> NDArray[np.float32]:
            nonlocal decoded
            image = decode_untrusted(self._blobs.get(sha256), self._max_image_bytes, self._max_image_pixels)
            decoded = self._clock()
            return served.query_row(image, job.prompt)

        # One query at a time: with several in a batch, features differ in their last bits by who their neighbours are.
        row = self._features.get((sha256, job.prompt, served.preprocessing_hash), encode)
        encoded = self._clock()
        embedding = served.release.embed(row[None, :-1])[0]
        timings["decode"] = 1e3 * (decoded - begun)
        timings["encode"] = 1e3 * (encoded - decoded)
        timings["head"] = 1e3 * (self._clock() - encoded)
        labelled = served.release.labelled
        distance = None if labelled is None else labelled.distance(row[:-1])
        return embedding, None if np.isnan(row[-1]) else float(row[-1]), distance

def _item(hit: Hit, release: Release, delta: Delta | None) -> Item:
    """The item of a hit, as it was when release or delta was made."""
    if delta is not None and hit.item_id not in release.catalogue:
        return delta.catalogue[hit.item_id]
    return release.catalogue[hit.item_id]


def _groups(hits: Sequence[Hit], release: Release, delta: Delta | None) -> list[int]:
    """The near-duplicate groups of hits, in their order; only what is listed is worth making an item of."""
    groups: list[int] = release.catalogue.groups(np.array([hit.item_id for hit in hits], dtype=np.int64)).tolist()
    if delta is None or not delta.catalogue:
        return groups
    added = [delta.catalogue.get(hit.item_id) for hit in hits]
    return [group if one is None else one.near_duplicate_group for one, group in zip(added, groups, strict=True)]


def _require_model(job: Job, release: Release) -> None:
    """Raise ModelMismatch for a job of another model: its answer would look right and mean nothing."""
    answering = release.manifest.model_id
    if answering != job.model_id:
        raise ModelMismatch(
            f"the job is for model {job.model_id}, release {release.release_id} that answers here is of {answering}",
            model_id=job.model_id,
            release_id=release.release_id,
            release_model_id=answering,
        )


def _ready_embedding(job: Job, release: Release) -> NDArray[np.float32]:
    """The embedding the client sent; InvalidRequest unless it was made by this very release's head."""
    manifest = release.manifest
    made_by = job.payload.get("embedding_release_id")
    if made_by and made_by != manifest.release_id:
        raise InvalidRequest(
            "query.embedding.release",
            f"the embedding is of release {made_by}, but {manifest.release_id} answers now: embed the query again",
            release_id=manifest.release_id,
        )
    embedding = np.asarray(job.embedding, dtype=np.float32)
    if embedding.shape != (manifest.embedding_dim,):
        raise InvalidRequest(
            "query.embedding.values",
            f"has {embedding.size} values, an embedding of release {manifest.release_id} has {manifest.embedding_dim}",
            release_id=manifest.release_id,
        )
    return embedding
