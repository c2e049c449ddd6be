"""Stage ``rank``: a teacher's ranking of one curation query, kept as a row of ``rankings``.

Why it exists: labels are made by the machinery that serves clients (leases, fences, cancellation come free),
and the row is written in the transaction that completes the job: a label exists exactly when its job succeeded.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from byline.catalog.blobs import BlobStore
from byline.catalog.decode import decode_image
from byline.catalog.items import Item
from byline.catalog.store import CatalogStore
from byline.errors import BlobNotFound, InvalidRequest
from byline.jobs import Claim
from byline.jobs.runner import Beat, Outcome
from byline.rankings.store import RankingStore
from byline.teachers import Ranking, TeacherItem, TeacherQuery
from byline.telemetry import RANKINGS_ADDED
from services.workers.teacher_bench import TeacherBench

#: The candidate set that means every item of the corpus that is not withdrawn.
WHOLE_CORPUS = "corpus"


@dataclass(frozen=True)
class RankRequest:
    """What curation asks: rank these candidates for this query with this teacher and this many noise draws."""

    query_id: uuid.UUID
    teacher: str
    draws: int
    candidate_set: str
    #: None stands for the whole corpus.
    candidate_ids: tuple[int, ...] | None
    #: Further fields of the teacher's settings, for labels that must be comparable with earlier ones.
    teacher_settings: Mapping[str, Any]

    @classmethod
    def of(cls, payload: Mapping[str, Any], *, teacher: str, draws: int) -> RankRequest:
        """Parse a job's payload; ``teacher`` and ``draws`` are the defaults. Raises InvalidRequest."""
        try:
            query_id = uuid.UUID(str(payload["query_id"]))
            ids = payload.get("candidate_ids")
            wanted = None if ids is None else tuple(int(item_id) for item_id in ids)
            count = int(payload.get("draws") or draws)
            settings = dict(payload.get("teacher_settings") or {})
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidRequest("payload", f"is not a ranking request: {error!r}") from error
        name = payload.get("candidate_set") or (WHOLE_CORPUS if wanted is None else _name_of(wanted))
        if wanted is None and name != WHOLE_CORPUS:
            raise InvalidRequest("payload.candidate_set", f"{name!r} needs candidate_ids; only 'corpus' does without")
        return cls(query_id, str(payload.get("teacher") or teacher), count, str(name), wanted, settings)


class RankStage:
    """Turns a claim on stage ``rank`` into a ranking row."""

    def __init__(
        self,
        *,
        rankings: RankingStore,
        catalog: CatalogStore,
        bench: TeacherBench,
        blobs: BlobStore,
        corpus_id: str,
        withdrawn: Callable[[], Iterable[int]],
        teacher: str,
        draws: int,
        clock: Callable[[], float],
    ) -> None:
        self._rankings = rankings
        self._catalog = catalog
        self._bench = bench
        self._blobs = blobs
        self._corpus_id = corpus_id
        self._withdrawn = withdrawn
        self._teacher = teacher
        self._draws = draws
        self._clock = clock

    def __call__(self, claim: Claim, beat: Beat) -> Outcome:
        """Score the candidates. Items withdrawn since the job was made are left out; so is their ranking."""
        begun = self._clock()
        job = claim.job
        request = RankRequest.of(job.payload, teacher=self._teacher, draws=self._draws)
        self._bench.require_revision(self._catalog.model(job.model_id).revision, f"model {job.model_id} as registered")
        asked = self._rankings.query(request.query_id)
        if asked is None:
            raise InvalidRequest("payload.query_id", f"no query is recorded as {request.query_id}")
        candidates = self._candidates(request)
        if not candidates:
            raise InvalidRequest("payload.candidate_ids", "no candidate is left in the corpus")
        beat.progress(0, len(candidates))
        query = TeacherQuery(decode_image(self._blobs.get(asked.image_sha256)), asked.prompt)
        items = [TeacherItem(one.item_id, self._image(one), one.caption) for one in candidates]
        teacher = self._bench.teacher(
            request.teacher, request.draws, overrides=request.teacher_settings, check=beat.check
        )
        ranking = teacher.score(
            query, items, candidate_set=request.candidate_set, progress=beat.progress, check=beat.check
        )
        result: dict[str, Any] = {
            "tier": None,
            "release_id": None,
            "model_revision": self._bench.model_revision,
            "query_id": str(request.query_id),
            "teacher_id": ranking.teacher_id,
            "candidate_set": ranking.candidate_set,
            "n": len(ranking.item_ids),
            "draws": ranking.draws,
            "influences": [],
            "timings_ms": {"total": round(1e3 * (self._clock() - begun), 3)},
        }
        return Outcome(result, also=self._writer(request, ranking, job.id))

    def _writer(self, request: RankRequest, ranking: Ranking, job_id: uuid.UUID) -> Callable[[Connection], None]:
        def write(connection: Connection) -> None:
            if self._rankings.add_ranking(connection, request.query_id, ranking, job_id=job_id):
                RANKINGS_ADDED.labels("job").inc()

        return write

    def _candidates(self, request: RankRequest) -> Sequence[Item]:
        gone = frozenset(self._withdrawn())
        if request.candidate_ids is None:
            return [one for one in self._catalog.items(self._corpus_id) if one.item_id not in gone]
        found = self._catalog.by_ids(request.candidate_ids)
        return [found[item_id] for item_id in request.candidate_ids if item_id in found and item_id not in gone]

    def _image(self, item: Item) -> Any:
        try:
            return decode_image(self._blobs.get(item.image_sha256))
        except BlobNotFound as error:
            raise BlobNotFound(f"the image of item {item.item_id} is not stored", item_id=item.item_id) from error


def _name_of(item_ids: Sequence[int]) -> str:
    """A name for an unnamed list: equal lists have equal names, whatever their order."""
    digest = hashlib.sha256(",".join(str(item_id) for item_id in sorted(item_ids)).encode()).hexdigest()[:12]
    return f"list-{len(item_ids)}-{digest}"
