"""Stage ``rank``: a teacher's rankings of curation queries, kept as rows of ``rankings``.

Why it exists: labels are made by the machinery that serves clients (leases, fences, cancellation come free), and
the rows are written in the transaction that completes the job: labels exist exactly when their job succeeded.

A job asks for several queries because the first-order teachers spend nearly all of their time on the items: the
union of the candidates is scored once for all queries, and every query keeps its own candidates of it. Other teachers
score query after query. Either way what is done is kept, and a client's job goes first.
"""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import numpy as np
from sqlalchemy import Connection

from byline.catalog.blobs import BlobStore
from byline.catalog.decode import decode_image
from byline.catalog.items import Item
from byline.catalog.store import CatalogStore
from byline.errors import BlobNotFound, DatabaseUnavailable, GaveWay, InvalidRequest, TeacherNotUsable
from byline.jobs import Claim
from byline.jobs.runner import Beat, Outcome
from byline.rankings.store import RankingStore
from byline.security.decoding import decode_untrusted
from byline.teachers import Ranking, Teacher, TeacherItem, TeacherQuery
from byline.teachers.abu_plus import AbuPlus
from byline.teachers.first_order import AbuPlusLinear
from byline.teachers.ranking import Check, Progress, ignore_progress, never_cancelled
from byline.telemetry import RANKINGS_ADDED, get_logger
from services.workers.kept_rankings import KeptRankings
from services.workers.rank_request import RankRequest, Wanted
from services.workers.scratch import Scratch
from services.workers.teacher_bench import TeacherBench

log = get_logger(__name__)

#: Bytes of gradients in a chunk of a first-order pass: some seconds of work, after which progress is seen, what is
#: done is kept, and a client's job may go first.
CHUNK_BYTES = 64 << 20
#: Seconds of work a claim does at least before it gives way: starting again costs the queries' gradients.
GIVES_WAY_AFTER_S = 2.0


class ResumableTeacher(Teacher, Protocol):
    """A teacher that can keep finished chunks of a pass in a folder and go on behind them."""

    def score_many(
        self,
        queries: Sequence[TeacherQuery],
        candidates: Sequence[TeacherItem],
        *,
        candidate_set: str = "given",
        progress: Progress = ignore_progress,
        check: Check = never_cancelled,
        store: Path | None = None,
    ) -> list[Ranking]:
        """See ``Teacher``; ``store`` is the folder."""
        ...


def _can_resume(teacher: Teacher) -> TypeGuard[ResumableTeacher]:
    return "store" in inspect.signature(teacher.score_many).parameters


class RankStage:
    """Turns a claim on stage ``rank`` into ranking rows, one for each query."""

    def __init__(
        self,
        *,
        rankings: RankingStore,
        catalog: CatalogStore,
        bench: TeacherBench,
        blobs: BlobStore,
        scratch: Scratch,
        corpus_id: str,
        withdrawn: Callable[[], Iterable[int]],
        teacher: str,
        draws: int,
        clock: Callable[[], float],
        clients_wait: Callable[[], bool] = lambda: False,
    ) -> None:
        self._rankings = rankings
        self._catalog = catalog
        self._bench = bench
        self._blobs = blobs
        self._scratch = scratch
        self._corpus_id = corpus_id
        self._withdrawn = withdrawn
        self._teacher = teacher
        self._draws = draws
        self._clock = clock
        self._clients_wait = clients_wait

    def __call__(self, claim: Claim, beat: Beat) -> Outcome:
        """Score the candidates. Items withdrawn since the job was made are left out, until labels are written."""
        begun = self._clock()
        job = claim.job
        request = RankRequest.of(job.payload, teacher=self._teacher, draws=self._draws)
        self._bench.require_revision(self._catalog.model(job.model_id).revision, f"model {job.model_id} as registered")
        queries = [self._query(wanted.query_id) for wanted in request.wanted]
        candidates = self._candidates(request)
        union = list({item.item_id: item for items in candidates for item in items}.values())
        beat.progress(0, len(union))
        items = {one.item_id: self._item(one, beat) for one in union}
        teacher = self._bench.teacher(
            request.teacher, request.draws, overrides=request.teacher_settings, check=beat.check
        )
        lists = [[items[one.item_id] for one in of_query] for of_query in candidates]
        self._scratch.sweep()
        if _can_resume(teacher):
            rankings = self._in_one_pass(teacher, request, queries, list(items.values()), job.id, beat)
        else:
            rankings = self._one_by_one(teacher, request, queries, lists, job.id, beat)
        rankings = [
            replace(of_candidates(ranking, [one.item_id for one in own]), candidate_set=wanted.candidate_set)
            for ranking, own, wanted in zip(rankings, lists, request.wanted, strict=True)
        ]
        result: dict[str, Any] = {
            "tier": None,
            "release_id": None,
            "model_revision": self._bench.model_revision,
            "query_ids": [str(wanted.query_id) for wanted in request.wanted],
            "teacher_id": rankings[0].teacher_id,
            "candidate_sets": [ranking.candidate_set for ranking in rankings],
            "n": [len(ranking.item_ids) for ranking in rankings],
            "scored": len(items),
            "draws": rankings[0].draws,
            "influences": [],
            "timings_ms": {"total": round(1e3 * (self._clock() - begun), 3)},
        }
        return Outcome(
            result, also=self._writer(request.wanted, rankings, job.id), after=lambda: self._scratch.clear(job.id)
        )

    def _one_by_one(
        self, teacher: Teacher, request: RankRequest, queries: Sequence[TeacherQuery],
        lists: Sequence[Sequence[TeacherItem]], job_id: uuid.UUID, beat: Beat,
    ) -> list[Ranking]:  # fmt: skip
        """Query after query, each over its own candidates; finished ones outlive this attempt.

        A client may go first between two queries, and within one of the exact form, which keeps every loss it has
        measured.
        """
        work = [teacher.teacher_id]
        for wanted, items in zip(request.wanted, lists, strict=True):
            work += [str(wanted.query_id), *(str(item.item_id) for item in items)]
        kept = KeptRankings(self._scratch.folder(job_id, work))
        between = self._yielding(beat)
        within = between if isinstance(teacher, AbuPlus) else beat.progress
        found: list[Ranking] = []
        before, total = 0, sum(map(len, lists))
        for wanted, query, items in zip(request.wanted, queries, lists, strict=True):

            def onward(done: int, of: int, before: int = before) -> None:
                (within if done < of else beat.progress)(before + done, total)

            ranking = kept.get(wanted.query_id)
            if ranking is None:
                ranking = teacher.score(query, items, progress=onward, check=beat.check)
                kept.put(wanted.query_id, ranking)
            found.append(ranking)
            before += len(items)
            between(before, total)
        return found

    def _in_one_pass(
        self, teacher: ResumableTeacher, request: RankRequest, queries: Sequence[TeacherQuery],
        items: Sequence[TeacherItem], job_id: uuid.UUID, beat: Beat,
    ) -> list[Ranking]:  # fmt: skip
        """All queries over all items at once; finished chunks outlive this attempt."""
        if isinstance(teacher, AbuPlusLinear):
            teacher.memory = min(teacher.memory, CHUNK_BYTES)
        asked = [str(wanted.query_id) for wanted in request.wanted]
        work = [teacher.teacher_id, *asked, *(str(item.item_id) for item in items)]
        folder = self._scratch.folder(job_id, work)
        resumes = any(folder.iterdir())
        log.info("ranking_pass", queries=len(queries), items=len(items), resumes=resumes)
        progress = self._yielding(beat)
        try:
            return teacher.score_many(queries, items, progress=progress, check=beat.check, store=folder)
        except TeacherNotUsable:
            if not resumes:
                raise
            # What is kept is of another pass after all (other rounding on another machine): begin anew.
            self._scratch.clear(job_id)
            folder = self._scratch.folder(job_id, work)
            return teacher.score_many(queries, items, progress=progress, check=beat.check, store=folder)

    def _yielding(self, beat: Beat) -> Progress:
        """Progress that lets a client's job go first, between two chunks and not before some work is done.

        It is called when a chunk, a query or some losses are kept. Those of an earlier attempt are reported in no time,
        so a claim that gives way has kept more than the claim before: clients delay a ranking, they never starve it.
        """
        first: float | None = None

        def progress(done: int, total: int) -> None:
            nonlocal first
            beat.progress(done, total)
            now = self._clock()
            first = now if first is None else first
            if done < total and now - first > GIVES_WAY_AFTER_S and self._somebody_waits():
                raise GaveWay("a client waits; this ranking goes on later")

        return progress

    def _somebody_waits(self) -> bool:
        try:
            return self._clients_wait()
        except DatabaseUnavailable:  # nobody can be served without it, and this work goes on
            return False

    def _writer(
        self, wanted: Sequence[Wanted], rankings: Sequence[Ranking], job_id: uuid.UUID
    ) -> Callable[[Connection], None]:
        def write(connection: Connection) -> None:
            # A ranking takes minutes: what was withdrawn meanwhile may be purged already, and must not come back.
            named = sorted({item_id for ranking in rankings for item_id in ranking.item_ids.tolist()})
            gone = CatalogStore.withdrawn_among(connection, named)
            for one, ranking in zip(wanted, rankings, strict=True):
                left = [item_id for item_id in ranking.item_ids.tolist() if item_id not in gone]
                kept = of_candidates(ranking, left)
                if left and self._rankings.add_ranking(connection, one.query_id, kept, job_id=job_id):
                    RANKINGS_ADDED.labels("job").inc()

        return write

    def _query(self, query_id: uuid.UUID) -> TeacherQuery:
        asked = self._rankings.query(query_id)
        if asked is None:
            raise InvalidRequest("payload.query_ids", f"no query is recorded as {query_id}")
        return TeacherQuery(decode_untrusted(self._blobs.get(asked.image_sha256)), asked.prompt)

    def _candidates(self, request: RankRequest) -> list[list[Item]]:
        """The items of each query, as asked for and in that order, without those withdrawn since."""
        gone = frozenset(self._withdrawn())
        named = {item_id for wanted in request.wanted for item_id in wanted.candidate_ids or ()}
        known: Mapping[int, Item] = self._catalog.by_ids(sorted(named)) if named else {}
        corpus: list[int] = []
        if any(wanted.candidate_ids is None for wanted in request.wanted):
            every = {item.item_id: item for item in self._catalog.items(self._corpus_id)}
            corpus, known = list(every), {**known, **every}
        lists = []
        for wanted in request.wanted:
            ids = corpus if wanted.candidate_ids is None else wanted.candidate_ids
            lists.append([known[item_id] for item_id in ids if item_id in known and item_id not in gone])
            if not lists[-1]:
                raise InvalidRequest(
                    "payload.candidate_ids", f"no candidate of query {wanted.query_id} is left in the corpus"
                )
        return lists

    def _item(self, item: Item, beat: Beat) -> TeacherItem:
        beat.check()
        try:
            return TeacherItem(item.item_id, decode_image(self._blobs.get(item.image_sha256)), item.caption)
        except BlobNotFound as error:
            raise BlobNotFound(f"the image of item {item.item_id} is not stored", item_id=item.item_id) from error


def of_candidates(ranking: Ranking, item_ids: Sequence[int]) -> Ranking:
    """The part of a ranking that is about ``item_ids``, in their order. KeyError for one that was not scored."""
    place = {item_id: number for number, item_id in enumerate(ranking.item_ids.tolist())}
    rows = np.array([place[item_id] for item_id in item_ids], dtype=np.int64)
    return replace(
        ranking,
        item_ids=ranking.item_ids[rows],
        tau=ranking.tau[rows],
        standard_error=ranking.standard_error[rows],
        tau_halves=ranking.tau_halves[:, rows],
        samples=ranking.samples[rows],
    )
