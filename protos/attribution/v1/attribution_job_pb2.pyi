import datetime

from google.api import field_behavior_pb2 as _field_behavior_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.rpc import status_pb2 as _status_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[Tier]
    TIER_RETRIEVED: _ClassVar[Tier]
    TIER_ESTIMATED: _ClassVar[Tier]
    TIER_VERIFIED: _ClassVar[Tier]

class Verification(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VERIFICATION_UNSPECIFIED: _ClassVar[Verification]
    VERIFICATION_REQUIRED: _ClassVar[Verification]
    VERIFICATION_BEST_EFFORT: _ClassVar[Verification]

class Copies(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COPIES_UNSPECIFIED: _ClassVar[Copies]
    COPIES_TOGETHER: _ClassVar[Copies]
    COPIES_APART: _ClassVar[Copies]
TIER_UNSPECIFIED: Tier
TIER_RETRIEVED: Tier
TIER_ESTIMATED: Tier
TIER_VERIFIED: Tier
VERIFICATION_UNSPECIFIED: Verification
VERIFICATION_REQUIRED: Verification
VERIFICATION_BEST_EFFORT: Verification
COPIES_UNSPECIFIED: Copies
COPIES_TOGETHER: Copies
COPIES_APART: Copies

class AttributionJob(_message.Message):
    __slots__ = ("name", "model", "query", "options", "state", "progress", "release", "answers", "error", "verification_error", "attempt", "revision", "create_time", "start_time", "end_time", "update_time", "expire_time", "request_id")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[AttributionJob.State]
        STATE_QUEUED: _ClassVar[AttributionJob.State]
        STATE_RUNNING: _ClassVar[AttributionJob.State]
        STATE_CANCELLING: _ClassVar[AttributionJob.State]
        STATE_SUCCEEDED: _ClassVar[AttributionJob.State]
        STATE_FAILED: _ClassVar[AttributionJob.State]
        STATE_CANCELLED: _ClassVar[AttributionJob.State]
    STATE_UNSPECIFIED: AttributionJob.State
    STATE_QUEUED: AttributionJob.State
    STATE_RUNNING: AttributionJob.State
    STATE_CANCELLING: AttributionJob.State
    STATE_SUCCEEDED: AttributionJob.State
    STATE_FAILED: AttributionJob.State
    STATE_CANCELLED: AttributionJob.State
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    QUERY_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    VERIFICATION_ERROR_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    END_TIME_FIELD_NUMBER: _ClassVar[int]
    UPDATE_TIME_FIELD_NUMBER: _ClassVar[int]
    EXPIRE_TIME_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    name: str
    model: str
    query: Query
    options: JobOptions
    state: AttributionJob.State
    progress: Progress
    release: str
    answers: _containers.RepeatedCompositeFieldContainer[Answer]
    error: _status_pb2.Status
    verification_error: _status_pb2.Status
    attempt: int
    revision: int
    create_time: _timestamp_pb2.Timestamp
    start_time: _timestamp_pb2.Timestamp
    end_time: _timestamp_pb2.Timestamp
    update_time: _timestamp_pb2.Timestamp
    expire_time: _timestamp_pb2.Timestamp
    request_id: str
    def __init__(self, name: _Optional[str] = ..., model: _Optional[str] = ..., query: _Optional[_Union[Query, _Mapping]] = ..., options: _Optional[_Union[JobOptions, _Mapping]] = ..., state: _Optional[_Union[AttributionJob.State, str]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., release: _Optional[str] = ..., answers: _Optional[_Iterable[_Union[Answer, _Mapping]]] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., verification_error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., attempt: _Optional[int] = ..., revision: _Optional[int] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., end_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., update_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., expire_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., request_id: _Optional[str] = ...) -> None: ...

class Query(_message.Message):
    __slots__ = ("inline_image", "image", "embedding", "prompt")
    INLINE_IMAGE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    inline_image: bytes
    image: str
    embedding: Embedding
    prompt: str
    def __init__(self, inline_image: _Optional[bytes] = ..., image: _Optional[str] = ..., embedding: _Optional[_Union[Embedding, _Mapping]] = ..., prompt: _Optional[str] = ...) -> None: ...

class Embedding(_message.Message):
    __slots__ = ("values", "release")
    VALUES_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    release: str
    def __init__(self, values: _Optional[_Iterable[float]] = ..., release: _Optional[str] = ...) -> None: ...

class JobOptions(_message.Message):
    __slots__ = ("tier", "top_k", "candidates", "verification", "ttl", "copies", "labelling_consent")
    TIER_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    VERIFICATION_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    LABELLING_CONSENT_FIELD_NUMBER: _ClassVar[int]
    tier: Tier
    top_k: int
    candidates: int
    verification: Verification
    ttl: _duration_pb2.Duration
    copies: Copies
    labelling_consent: bool
    def __init__(self, tier: _Optional[_Union[Tier, str]] = ..., top_k: _Optional[int] = ..., candidates: _Optional[int] = ..., verification: _Optional[_Union[Verification, str]] = ..., ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., copies: _Optional[_Union[Copies, str]] = ..., labelling_consent: _Optional[bool] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("stage", "done", "total")
    class Stage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STAGE_UNSPECIFIED: _ClassVar[Progress.Stage]
        STAGE_LOOKUP: _ClassVar[Progress.Stage]
        STAGE_ESTIMATE: _ClassVar[Progress.Stage]
        STAGE_VERIFY: _ClassVar[Progress.Stage]
    STAGE_UNSPECIFIED: Progress.Stage
    STAGE_LOOKUP: Progress.Stage
    STAGE_ESTIMATE: Progress.Stage
    STAGE_VERIFY: Progress.Stage
    STAGE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    stage: Progress.Stage
    done: int
    total: int
    def __init__(self, stage: _Optional[_Union[Progress.Stage, str]] = ..., done: _Optional[int] = ..., total: _Optional[int] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("tier", "release", "model_revision", "verdict", "influences", "withdrawn_influences", "noise_floor", "teacher_id", "draws", "credit", "timings_ms", "create_time", "evidence", "evidence_floor", "delta_sequence", "corpus_sequence", "labelled_distance", "labelled_distance_limit", "far_from_labelled")
    class Verdict(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        VERDICT_UNSPECIFIED: _ClassVar[Answer.Verdict]
        VERDICT_ATTRIBUTABLE: _ClassVar[Answer.Verdict]
        VERDICT_NOT_ATTRIBUTABLE: _ClassVar[Answer.Verdict]
    VERDICT_UNSPECIFIED: Answer.Verdict
    VERDICT_ATTRIBUTABLE: Answer.Verdict
    VERDICT_NOT_ATTRIBUTABLE: Answer.Verdict
    class TimingsMsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    TIER_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    MODEL_REVISION_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    INFLUENCES_FIELD_NUMBER: _ClassVar[int]
    WITHDRAWN_INFLUENCES_FIELD_NUMBER: _ClassVar[int]
    NOISE_FLOOR_FIELD_NUMBER: _ClassVar[int]
    TEACHER_ID_FIELD_NUMBER: _ClassVar[int]
    DRAWS_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_MS_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FLOOR_FIELD_NUMBER: _ClassVar[int]
    DELTA_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    CORPUS_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    LABELLED_DISTANCE_FIELD_NUMBER: _ClassVar[int]
    LABELLED_DISTANCE_LIMIT_FIELD_NUMBER: _ClassVar[int]
    FAR_FROM_LABELLED_FIELD_NUMBER: _ClassVar[int]
    tier: Tier
    release: str
    model_revision: str
    verdict: Answer.Verdict
    influences: _containers.RepeatedCompositeFieldContainer[Influence]
    withdrawn_influences: int
    noise_floor: float
    teacher_id: str
    draws: int
    credit: Credit
    timings_ms: _containers.ScalarMap[str, float]
    create_time: _timestamp_pb2.Timestamp
    evidence: float
    evidence_floor: float
    delta_sequence: int
    corpus_sequence: int
    labelled_distance: float
    labelled_distance_limit: float
    far_from_labelled: bool
    def __init__(self, tier: _Optional[_Union[Tier, str]] = ..., release: _Optional[str] = ..., model_revision: _Optional[str] = ..., verdict: _Optional[_Union[Answer.Verdict, str]] = ..., influences: _Optional[_Iterable[_Union[Influence, _Mapping]]] = ..., withdrawn_influences: _Optional[int] = ..., noise_floor: _Optional[float] = ..., teacher_id: _Optional[str] = ..., draws: _Optional[int] = ..., credit: _Optional[_Union[Credit, _Mapping]] = ..., timings_ms: _Optional[_Mapping[str, float]] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., evidence: _Optional[float] = ..., evidence_floor: _Optional[float] = ..., delta_sequence: _Optional[int] = ..., corpus_sequence: _Optional[int] = ..., labelled_distance: _Optional[float] = ..., labelled_distance_limit: _Optional[float] = ..., far_from_labelled: _Optional[bool] = ...) -> None: ...

class Influence(_message.Message):
    __slots__ = ("item", "item_id", "rank", "cosine", "tau", "standard_error", "probability", "retrieved_rank", "caption", "creator", "licence", "near_duplicate_group", "image_sha256", "copies")
    ITEM_FIELD_NUMBER: _ClassVar[int]
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    COSINE_FIELD_NUMBER: _ClassVar[int]
    TAU_FIELD_NUMBER: _ClassVar[int]
    STANDARD_ERROR_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    RETRIEVED_RANK_FIELD_NUMBER: _ClassVar[int]
    CAPTION_FIELD_NUMBER: _ClassVar[int]
    CREATOR_FIELD_NUMBER: _ClassVar[int]
    LICENCE_FIELD_NUMBER: _ClassVar[int]
    NEAR_DUPLICATE_GROUP_FIELD_NUMBER: _ClassVar[int]
    IMAGE_SHA256_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    item: str
    item_id: int
    rank: int
    cosine: float
    tau: float
    standard_error: float
    probability: Probability
    retrieved_rank: int
    caption: str
    creator: str
    licence: str
    near_duplicate_group: int
    image_sha256: str
    copies: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, item: _Optional[str] = ..., item_id: _Optional[int] = ..., rank: _Optional[int] = ..., cosine: _Optional[float] = ..., tau: _Optional[float] = ..., standard_error: _Optional[float] = ..., probability: _Optional[_Union[Probability, _Mapping]] = ..., retrieved_rank: _Optional[int] = ..., caption: _Optional[str] = ..., creator: _Optional[str] = ..., licence: _Optional[str] = ..., near_duplicate_group: _Optional[int] = ..., image_sha256: _Optional[str] = ..., copies: _Optional[_Iterable[int]] = ...) -> None: ...

class Probability(_message.Message):
    __slots__ = ("value", "low", "high", "coverage", "top")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    COVERAGE_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    value: float
    low: float
    high: float
    coverage: float
    top: int
    def __init__(self, value: _Optional[float] = ..., low: _Optional[float] = ..., high: _Optional[float] = ..., coverage: _Optional[float] = ..., top: _Optional[int] = ...) -> None: ...

class Credit(_message.Message):
    __slots__ = ("policy", "shares", "unattributed")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    UNATTRIBUTED_FIELD_NUMBER: _ClassVar[int]
    policy: str
    shares: _containers.RepeatedCompositeFieldContainer[CreatorShare]
    unattributed: float
    def __init__(self, policy: _Optional[str] = ..., shares: _Optional[_Iterable[_Union[CreatorShare, _Mapping]]] = ..., unattributed: _Optional[float] = ...) -> None: ...

class CreatorShare(_message.Message):
    __slots__ = ("creator", "share", "item_ids")
    CREATOR_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    creator: str
    share: float
    item_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, creator: _Optional[str] = ..., share: _Optional[float] = ..., item_ids: _Optional[_Iterable[int]] = ...) -> None: ...
