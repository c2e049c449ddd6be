"""Jobs, answers and releases to the wire.

Why it exists: the library knows nothing of protos; this is the only place where its values become messages.
Withdrawn items are left out here, so no way of reading a job can forget it (promise 7).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from datetime import datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from attribution.v1 import attribution_job_pb2 as wire
from attribution.v1 import catalog_service_pb2 as catalog_wire
from attribution.v1 import release_pb2 as release_wire
from byline.catalog.items import Item
from byline.catalog.store import ModelRecord
from byline.jobs.model import Job, StageResult
from byline.jobs.states import Stage, State, Tier, Verification
from byline.releases.manifest import ReleaseManifest
from byline.releases.registry import ActiveRelease, ReleaseRecord
from services.gateway import names, status

_STATES = {state: wire.AttributionJob.State.Value(f"STATE_{state.value}") for state in State}
_FROM_STATES = {number: state for state, number in _STATES.items()}
_TIERS = {tier: wire.Tier.Value(f"TIER_{tier.value}") for tier in Tier}
_VERIFICATIONS = {policy: wire.Verification.Value(f"VERIFICATION_{policy.value}") for policy in Verification}
_STAGES = {
    Stage.LOOKUP: wire.Progress.STAGE_LOOKUP,
    Stage.ESTIMATE: wire.Progress.STAGE_ESTIMATE,
    Stage.VERIFY: wire.Progress.STAGE_VERIFY,
}
_ANSWERING = (Stage.LOOKUP, Stage.ESTIMATE, Stage.VERIFY)


def state_from_wire(number: int) -> State | None:
    """The state of an enum number; None if it is not one a job can be in."""
    return _FROM_STATES.get(number)


def job(
    row: Job, results: Iterable[StageResult], corpus_id: str, withdrawn: Collection[int], *, with_answers: bool
) -> wire.AttributionJob:
    """A job with its answers; items in ``withdrawn`` are left out of them."""
    message = wire.AttributionJob(
        name=names.job(row.project_id, row.id),
        model=names.model(row.model_id),
        query=_query(row),
        options=_options(row),
        state=_STATES[row.state],
        release=names.release(row.model_id, row.release_id or ""),
        attempt=row.attempt,
        revision=row.revision,
        create_time=timestamp(row.create_time),
        start_time=timestamp(row.start_time),
        end_time=timestamp(row.end_time),
        update_time=timestamp(row.update_time),
        expire_time=timestamp(row.expire_time),
        request_id=row.request_id,
    )
    if not row.is_terminal and row.stage in _STAGES:
        message.progress.CopyFrom(
            wire.Progress(stage=_STAGES[row.stage], done=row.progress_done, total=row.progress_total)
        )
    if row.state is State.FAILED and row.error:
        message.error.CopyFrom(status.from_stored(row.error))
    for result in sorted((r for r in results if r.stage in _ANSWERING), key=lambda r: _ANSWERING.index(r.stage)):
        failure = result.result.get("verification_error")
        if failure:
            message.verification_error.CopyFrom(status.from_stored(failure))
        if with_answers and "influences" in result.result:
            message.answers.append(_answer(row, result, corpus_id, withdrawn))
    return message


def _query(row: Job) -> wire.Query:
    query = wire.Query(prompt=row.prompt)
    if row.image_sha256 is not None:
        query.image = names.image(row.project_id, row.image_sha256)
    elif row.embedding is not None:
        release_id = str(row.payload.get("embedding_release_id", ""))
        query.embedding.CopyFrom(wire.Embedding(values=row.embedding, release=names.release(row.model_id, release_id)))
    return query


def _options(row: Job) -> wire.JobOptions:
    options = wire.JobOptions(
        tier=_TIERS[row.tier], top_k=row.top_k, candidates=row.candidates if row.tier is Tier.VERIFIED else 0,
        verification=_VERIFICATIONS[row.verification],
        copies=wire.COPIES_APART if row.payload.get("copies") == "apart" else wire.COPIES_TOGETHER,
        labelling_consent=row.payload.get("may_learn") == "true",
    )  # fmt: skip
    options.ttl.FromTimedelta(row.expire_time - row.create_time)
    return options


def _answer(row: Job, stage_result: StageResult, corpus_id: str, withdrawn: Collection[int]) -> wire.Answer:
    result = stage_result.result
    all_influences = [_influence(entry, corpus_id) for entry in result["influences"]]
    kept = [influence for influence in all_influences if influence.item_id not in withdrawn]
    gone = len(all_influences) - len(kept) + int(result.get("purged_influences") or 0)
    if result.get("copies") == "together":
        kept = _gathered(kept)
    answer = wire.Answer(
        tier=_TIERS[Tier(result["tier"])],
        release=names.release(row.model_id, str(result.get("release_id") or stage_result.release_id or "")),
        model_revision=str(result.get("model_revision") or ""),
        verdict=_verdict(result),
        influences=kept[: row.top_k],
        withdrawn_influences=gone,
        delta_sequence=int(result.get("delta_sequence") or 0),
        teacher_id=str(result.get("teacher_id") or ""),
        draws=int(result.get("draws") or 0),
        timings_ms={str(k): float(v) for k, v in (result.get("timings_ms") or {}).items()},
        create_time=timestamp(stage_result.created_at),
    )
    for field in ("noise_floor", "evidence", "evidence_floor", "corpus_sequence", "labelled_distance",
                  "labelled_distance_limit"):  # fmt: skip
        if result.get(field) is not None:
            setattr(answer, field, int(result[field]) if field == "corpus_sequence" else float(result[field]))
    if answer.HasField("labelled_distance") and answer.HasField("labelled_distance_limit"):
        answer.far_from_labelled = answer.labelled_distance > answer.labelled_distance_limit
    return answer


def _gathered(influences: Iterable[wire.Influence]) -> list[wire.Influence]:
    """One of each near-duplicate group, the first that is left; the others are its copies. A group is credited once,
    and ranks count groups: where the first of one was withdrawn, a copy stands further down."""
    first: dict[int, wire.Influence] = {}
    for influence in influences:
        kept = first.setdefault(influence.near_duplicate_group, influence)
        if kept is not influence:
            kept.copies.append(influence.item_id)
    for rank, influence in enumerate(first.values(), start=1):
        influence.rank = rank
    return list(first.values())


def _verdict(result: Mapping[str, Any]) -> wire.Answer.Verdict:
    """NOT_ATTRIBUTABLE when it was said; ATTRIBUTABLE only where a noise floor was there to rise above."""
    if result.get("not_attributable"):
        return wire.Answer.VERDICT_NOT_ATTRIBUTABLE
    if result.get("noise_floor") is not None:
        return wire.Answer.VERDICT_ATTRIBUTABLE
    return wire.Answer.VERDICT_UNSPECIFIED


def _influence(entry: Mapping[str, Any], corpus_id: str) -> wire.Influence:
    item_id = int(entry["item_id"])
    influence = wire.Influence(
        item=names.item(corpus_id, item_id),
        item_id=item_id,
        rank=int(entry["rank"]),
        caption=str(entry.get("caption") or ""),
        creator=str(entry.get("creator") or ""),
        licence=str(entry.get("licence") or ""),
        near_duplicate_group=int(entry.get("near_duplicate_group") or 0),
        image_sha256=str(entry.get("image_sha256") or ""),
    )
    for field in ("cosine", "tau", "standard_error"):
        if entry.get(field) is not None:
            setattr(influence, field, float(entry[field]))
    if entry.get("retrieved_rank") is not None:
        influence.retrieved_rank = int(entry["retrieved_rank"])
    if entry.get("probability") is not None:
        value = float(entry["probability"])
        influence.probability.value = value
        influence.probability.low = float(entry.get("probability_low", value))
        influence.probability.high = float(entry.get("probability_high", value))
        influence.probability.coverage = float(entry.get("probability_coverage") or 0.0)
        influence.probability.top = int(entry.get("probability_top") or 0)
    return influence


def release(record: ReleaseRecord) -> release_wire.Release:
    """A registered release."""
    manifest = record.manifest
    parent = record.parent or ""
    sketches = manifest.sketches
    return release_wire.Release(
        name=names.release(record.model_id, record.release_id),
        state=release_wire.Release.State.Value(f"STATE_{record.state.value}"),
        parent_release=names.release(record.model_id, parent),
        model_revision=manifest.model_revision,
        corpus=names.corpus(manifest.corpus_id),
        feature_spec=manifest.feature_spec,
        preprocessing_hash=manifest.preprocessing_hash,
        embedding_dim=manifest.embedding_dim,
        items=manifest.items,
        teacher_id=manifest.teacher_id,
        label_queries=manifest.labels.queries,
        metrics=dict(numbers(record.metrics)),
        reason=record.reason or "",
        create_time=timestamp(record.created_at),
        sketches=None if sketches is None else release_wire.Sketches(
            teacher_id=sketches.teacher_id, dimensions=sketches.dimensions, selection=sketches.selection,
            query_draws=sketches.query_draws, fidelity=sketches.fidelity,
        ),
        refresh=_refresh(manifest),
        collect_time=timestamp(record.collected_at),
    )  # fmt: skip


def _refresh(manifest: ReleaseManifest) -> release_wire.Refresh | None:
    made = manifest.refresh
    return None if made is None else release_wire.Refresh(
        triggers=[release_wire.Refresh.Trigger(trigger=one.trigger, detail=one.detail) for one in made.triggers],
        snapshot_time=timestamp(made.snapshot_at), start=made.start, validation_map=made.validation_map,
        held_out_split=made.held_out_split, held_out_queries=made.held_out_queries,
        labels_digest=manifest.labels.digest,
    )  # fmt: skip


def active_release(active: ActiveRelease) -> release_wire.ActiveRelease:
    """Which release answers now."""
    return release_wire.ActiveRelease(
        release=names.release(active.model_id, active.release_id),
        previous_release=names.release(active.model_id, active.previous_release_id or ""),
        epoch=active.epoch,
        update_time=timestamp(active.updated_at),
    )


def item(value: Item, corpus_id: str) -> catalog_wire.Item:
    """A corpus item."""
    return catalog_wire.Item(
        name=names.item(corpus_id, value.item_id), item_id=value.item_id, caption=value.caption,
        keywords=value.keywords, creator=value.creator, licence=value.licence, source=value.source,
        source_path=value.source_path, image_sha256=value.image_sha256,
        near_duplicate_group=value.near_duplicate_group,
    )  # fmt: skip


def model(record: ModelRecord) -> catalog_wire.Model:
    """A registered model."""
    return catalog_wire.Model(
        name=names.model(record.model_id), corpus=names.corpus(record.corpus_id), revision=record.revision
    )


def numbers(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """The numbers of nested metrics, by dotted name; everything else is left out."""
    found: list[tuple[str, float]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found += numbers(value, f"{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((name, float(value)))
    return found


def timestamp(moment: datetime | None) -> Timestamp | None:
    """A protobuf timestamp; None stays absent."""
    if moment is None:
        return None
    message = Timestamp()
    message.FromDatetime(moment)
    return message
