"""Stage ``verify``: the exact teacher on the candidates of the retrieved answer (tier VERIFIED).

Why it exists: the student guesses in milliseconds; this stage measures. It scores the candidates the lookup found
(of near-duplicates the one the lookup put first), names the lookup's release, and keeps both orders, so a client can
see where they differ.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from byline.catalog.blobs import BlobStore
from byline.catalog.decode import decode_image
from byline.errors import InvalidRequest, StageInputMissing
from byline.jobs import Claim, Job, Stage
from byline.jobs.runner import Beat, Outcome
from byline.jobs.store import JobStore
from byline.security.decoding import decode_untrusted
from byline.teachers import TeacherItem, TeacherQuery
from byline.teachers.abu_plus import AbuPlus
from services.workers.answer import Answer, candidates_of, item_ids_of, verified_answer
from services.workers.teacher_bench import TeacherBench
from services.workers.withdrawal import refuse_withdrawn


class VerifyStage:
    """Turns a claim on stage ``verify`` into a VERIFIED answer."""

    def __init__(
        self,
        *,
        store: JobStore,
        bench: TeacherBench,
        blobs: BlobStore,
        withdrawn: Callable[[], Iterable[int]],
        teacher: str,
        draws: int,
        clock: Callable[[], float],
        teacher_settings: Mapping[str, Any] | None = None,
        racing: bool = False,
    ) -> None:
        self._store = store
        self._bench = bench
        self._blobs = blobs
        self._withdrawn = withdrawn
        self._teacher = teacher
        self._draws = draws
        self._clock = clock
        #: Layer selection and further fields of the teacher's settings.
        self._teacher_settings = dict(teacher_settings or {})
        self._racing = racing

    def __call__(self, claim: Claim, beat: Beat) -> Outcome:
        """Score the candidates. Raises typed errors; JobCancelled, LeaseLost or a stop come out of ``beat``."""
        begun = self._clock()
        job = claim.job
        if job.image_sha256 is None:
            raise InvalidRequest("query", "verification needs the image; a ready embedding can only be retrieved")
        retrieved = self._retrieved(job)
        self._bench.require_revision(retrieved["model_revision"], "the retrieved answer")
        withdrawn = frozenset(self._withdrawn())
        candidates = candidates_of(retrieved, limit=job.candidates, excluded=withdrawn)
        beat.progress(0, len(candidates))
        query = TeacherQuery(decode_untrusted(self._blobs.get(job.image_sha256)), job.prompt)
        items = [
            TeacherItem(int(one["item_id"]), decode_image(self._blobs.get(one["image_sha256"])), one["caption"])
            for one in candidates
        ]
        decoded = self._clock()
        teacher = self._bench.teacher(self._teacher, self._draws, overrides=self._teacher_settings, check=beat.check)
        # One item stands for each group, so the first ``top_k`` items by τ are the groups that a client will see.
        if self._racing and isinstance(teacher, AbuPlus) and job.top_k < len(items):
            teacher = racing_for(teacher, job.top_k)
        loaded = self._clock()
        ranking = teacher.score(
            query, items, candidate_set=f"retrieved-{len(items)}", progress=beat.progress, check=beat.check
        )
        done = self._clock()
        answer = verified_answer(
            retrieved,
            candidates,
            ranking,
            top_k=job.top_k,
            excluded=withdrawn,
            model_revision=self._bench.model_revision,
            timings_ms={
                "decode": 1e3 * (decoded - begun),
                "load": 1e3 * (loaded - decoded),
                "teacher": 1e3 * (done - loaded),
                "total": 1e3 * (done - begun),
            },
        )
        named = item_ids_of(answer)
        return Outcome(answer, also=lambda connection: refuse_withdrawn(connection, named))

    def _retrieved(self, job: Job) -> Answer:
        found = self._store.results(job.id).get(Stage.LOOKUP)
        if found is None:
            raise StageInputMissing(f"job {job.id} has no retrieved answer to verify", job_id=job.id)
        return dict(found.result)


def racing_for(teacher: AbuPlus, top: int) -> AbuPlus:
    """The same teacher, spending its draws on who belongs to the ``top``: what a client will see of the answer.

    A copy that shares model, curvature and baselines, so that any number of values of ``top`` cost nothing.
    """
    racing = copy.copy(teacher)
    racing.settings = replace(teacher.settings, racing=top)
    return racing
