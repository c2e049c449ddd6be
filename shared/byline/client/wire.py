"""Messages of the wire to the client's values.

Why it exists: the one place of the client that knows the fields of the protos. An absent field becomes None;
enum numbers become their names without prefix; a value this client does not know becomes its number.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from google.rpc import code_pb2, error_details_pb2, status_pb2

from attribution.v1 import attribution_job_pb2 as job_wire
from attribution.v1 import catalog_service_pb2 as catalog_wire
from attribution.v1 import operator_service_pb2 as operator_wire
from attribution.v1 import release_pb2 as release_wire
from byline.client import values

_NOT_ATTRIBUTABLE = {
    job_wire.Answer.VERDICT_ATTRIBUTABLE: False,
    job_wire.Answer.VERDICT_NOT_ATTRIBUTABLE: True,
}


def job(message: job_wire.AttributionJob) -> values.Job:
    """A job."""
    options = message.options
    return values.Job(
        name=message.name,
        model=message.model,
        prompt=message.query.prompt,
        image=message.query.image,
        tier=_enum(job_wire.Tier, options.tier, "TIER_"),
        top_k=options.top_k,
        candidates=options.candidates,
        verification=_enum(job_wire.Verification, options.verification, "VERIFICATION_"),
        state=_enum(job_wire.AttributionJob.State, message.state, "STATE_"),
        stage=_enum(job_wire.Progress.Stage, message.progress.stage, "STAGE_") if message.HasField("progress") else "",
        progress_done=message.progress.done,
        progress_total=message.progress.total,
        release=message.release,
        answers=tuple(map(answer, message.answers)),
        error=problem(message.error) if message.HasField("error") else None,
        verification_error=problem(message.verification_error) if message.HasField("verification_error") else None,
        attempt=message.attempt,
        revision=message.revision,
        request_id=message.request_id,
        create_time=_time(message, "create_time"),
        start_time=_time(message, "start_time"),
        end_time=_time(message, "end_time"),
        expire_time=_time(message, "expire_time"),
    )


def answer(message: job_wire.Answer) -> values.Answer:
    """The answer of one tier."""
    return values.Answer(
        tier=_enum(job_wire.Tier, message.tier, "TIER_"),
        release=message.release,
        model_revision=message.model_revision,
        not_attributable=_NOT_ATTRIBUTABLE.get(message.verdict),
        noise_floor=_optional(message, "noise_floor"),
        influences=tuple(map(influence, message.influences)),
        withdrawn_influences=message.withdrawn_influences,
        teacher_id=message.teacher_id,
        draws=message.draws,
        credit=_credit(message.credit) if message.HasField("credit") else None,
        timings_ms=dict(message.timings_ms),
        create_time=_time(message, "create_time"),
        evidence=_optional(message, "evidence"),
        evidence_floor=_optional(message, "evidence_floor"),
        delta_sequence=message.delta_sequence,
        corpus_sequence=_optional(message, "corpus_sequence"),
        labelled_distance=_optional(message, "labelled_distance"),
        labelled_distance_limit=_optional(message, "labelled_distance_limit"),
        far_from_labelled=message.far_from_labelled,
    )


def influence(message: job_wire.Influence) -> values.Influence:
    """One training image."""
    probability = None
    if message.HasField("probability"):
        p = message.probability
        probability = values.Probability(p.value, p.low, p.high, p.coverage, p.top)
    return values.Influence(
        item_id=message.item_id,
        rank=message.rank,
        cosine=_optional(message, "cosine"),
        tau=_optional(message, "tau"),
        standard_error=_optional(message, "standard_error"),
        probability=probability,
        retrieved_rank=_optional(message, "retrieved_rank"),
        caption=message.caption,
        creator=message.creator,
        licence=message.licence,
        near_duplicate_group=message.near_duplicate_group,
        image_sha256=message.image_sha256,
        name=message.item,
        copies=tuple(message.copies),
    )


def _credit(message: job_wire.Credit) -> values.Credit:
    shares = tuple(values.CreatorShare(s.creator, s.share, tuple(s.item_ids)) for s in message.shares)
    return values.Credit(message.policy, shares, message.unattributed)


def problem(status: status_pb2.Status) -> values.Problem:
    """Code, reason and message of a ``google.rpc.Status``."""
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Unpack(info):
            break
    return values.Problem(code_pb2.Code.Name(status.code), info.reason, status.message, dict(info.metadata))


def release(message: release_wire.Release) -> values.Release:
    """A release."""
    return values.Release(
        name=message.name,
        state=_enum(release_wire.Release.State, message.state, "STATE_"),
        parent=message.parent_release,
        model_revision=message.model_revision,
        corpus=message.corpus,
        feature_spec=message.feature_spec,
        embedding_dim=message.embedding_dim,
        items=message.items,
        teacher_id=message.teacher_id,
        label_queries=message.label_queries,
        metrics=dict(message.metrics),
        reason=message.reason,
        create_time=_time(message, "create_time"),
        sketches=_sketches(message.sketches) if message.HasField("sketches") else None,
        refresh=_refresh(message.refresh) if message.HasField("refresh") else None,
        collect_time=_time(message, "collect_time"),
    )


def _sketches(message: release_wire.Sketches) -> values.Sketches:
    return values.Sketches(
        message.teacher_id, message.dimensions, message.selection, message.query_draws, dict(message.fidelity)
    )


def _refresh(message: release_wire.Refresh) -> values.Refresh:
    return values.Refresh(
        tuple((one.trigger, one.detail) for one in message.triggers), _time(message, "snapshot_time"), message.start,
        dict(message.validation_map), message.held_out_split, message.held_out_queries, message.labels_digest,
    )  # fmt: skip


def active_release(message: release_wire.ActiveRelease) -> values.ActiveRelease:
    """Which release answers now."""
    return values.ActiveRelease(message.release, message.previous_release, message.epoch, _time(message, "update_time"))


def queue_status(message: operator_wire.QueueStatus) -> values.QueueStatus:
    """Stages and workers."""
    return values.QueueStatus(tuple(map(stage_status, message.stages)), tuple(map(worker_status, message.workers)))


def stage_status(message: operator_wire.StageStatus) -> values.StageStatus:
    """How a stage stands."""
    waited = message.oldest_wait.ToTimedelta() if message.HasField("oldest_wait") else None
    return values.StageStatus(message.stage, message.queued, message.running, waited, message.paused)


def worker_status(message: operator_wire.Worker) -> values.WorkerStatus:
    """One worker."""
    return values.WorkerStatus(
        message.worker_id, message.queue, message.release_id, message.error, _time(message, "start_time"),
        _time(message, "last_seen_time"), message.draining, _time(message, "drained_time"),
    )  # fmt: skip


def withdrawal(message: catalog_wire.WithdrawalReceipt) -> values.Withdrawal:
    """The receipt of a withdrawal."""
    return values.Withdrawal(
        message.corpus, tuple(message.withdrawn_item_ids), tuple(message.already_withdrawn_item_ids),
        tuple(message.unknown_item_ids), _time(message, "effective_time"),
    )  # fmt: skip


def _enum(kind: Any, number: int, prefix: str) -> str:
    try:
        name: str = kind.Name(number)
    except ValueError:
        return str(number)
    return name.removeprefix(prefix)


def _optional(message: Any, field: str) -> Any:
    return getattr(message, field) if message.HasField(field) else None


def _time(message: Any, field: str) -> datetime | None:
    if not message.HasField(field):
        return None
    moment: datetime = getattr(message, field).ToDatetime(tzinfo=UTC)
    return moment
