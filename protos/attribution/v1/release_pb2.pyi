import datetime

from google.api import field_behavior_pb2 as _field_behavior_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Release(_message.Message):
    __slots__ = ("name", "state", "parent_release", "model_revision", "corpus", "feature_spec", "preprocessing_hash", "embedding_dim", "items", "teacher_id", "label_queries", "metrics", "reason", "create_time", "sketches", "refresh", "collect_time")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[Release.State]
        STATE_BUILT: _ClassVar[Release.State]
        STATE_VALIDATED: _ClassVar[Release.State]
        STATE_ACTIVE: _ClassVar[Release.State]
        STATE_RETIRED: _ClassVar[Release.State]
        STATE_REJECTED: _ClassVar[Release.State]
    STATE_UNSPECIFIED: Release.State
    STATE_BUILT: Release.State
    STATE_VALIDATED: Release.State
    STATE_ACTIVE: Release.State
    STATE_RETIRED: Release.State
    STATE_REJECTED: Release.State
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PARENT_RELEASE_FIELD_NUMBER: _ClassVar[int]
    MODEL_REVISION_FIELD_NUMBER: _ClassVar[int]
    CORPUS_FIELD_NUMBER: _ClassVar[int]
    FEATURE_SPEC_FIELD_NUMBER: _ClassVar[int]
    PREPROCESSING_HASH_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_DIM_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    TEACHER_ID_FIELD_NUMBER: _ClassVar[int]
    LABEL_QUERIES_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    SKETCHES_FIELD_NUMBER: _ClassVar[int]
    REFRESH_FIELD_NUMBER: _ClassVar[int]
    COLLECT_TIME_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: Release.State
    parent_release: str
    model_revision: str
    corpus: str
    feature_spec: str
    preprocessing_hash: str
    embedding_dim: int
    items: int
    teacher_id: str
    label_queries: int
    metrics: _containers.ScalarMap[str, float]
    reason: str
    create_time: _timestamp_pb2.Timestamp
    sketches: Sketches
    refresh: Refresh
    collect_time: _timestamp_pb2.Timestamp
    def __init__(self, name: _Optional[str] = ..., state: _Optional[_Union[Release.State, str]] = ..., parent_release: _Optional[str] = ..., model_revision: _Optional[str] = ..., corpus: _Optional[str] = ..., feature_spec: _Optional[str] = ..., preprocessing_hash: _Optional[str] = ..., embedding_dim: _Optional[int] = ..., items: _Optional[int] = ..., teacher_id: _Optional[str] = ..., label_queries: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., reason: _Optional[str] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., sketches: _Optional[_Union[Sketches, _Mapping]] = ..., refresh: _Optional[_Union[Refresh, _Mapping]] = ..., collect_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class Refresh(_message.Message):
    __slots__ = ("triggers", "snapshot_time", "start", "validation_map", "held_out_split", "held_out_queries", "labels_digest")
    class Trigger(_message.Message):
        __slots__ = ("trigger", "detail")
        TRIGGER_FIELD_NUMBER: _ClassVar[int]
        DETAIL_FIELD_NUMBER: _ClassVar[int]
        trigger: str
        detail: str
        def __init__(self, trigger: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...
    class ValidationMapEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    TRIGGERS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_TIME_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_MAP_FIELD_NUMBER: _ClassVar[int]
    HELD_OUT_SPLIT_FIELD_NUMBER: _ClassVar[int]
    HELD_OUT_QUERIES_FIELD_NUMBER: _ClassVar[int]
    LABELS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    triggers: _containers.RepeatedCompositeFieldContainer[Refresh.Trigger]
    snapshot_time: _timestamp_pb2.Timestamp
    start: str
    validation_map: _containers.ScalarMap[str, float]
    held_out_split: str
    held_out_queries: int
    labels_digest: str
    def __init__(self, triggers: _Optional[_Iterable[_Union[Refresh.Trigger, _Mapping]]] = ..., snapshot_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., start: _Optional[str] = ..., validation_map: _Optional[_Mapping[str, float]] = ..., held_out_split: _Optional[str] = ..., held_out_queries: _Optional[int] = ..., labels_digest: _Optional[str] = ...) -> None: ...

class Sketches(_message.Message):
    __slots__ = ("teacher_id", "dimensions", "selection", "query_draws", "fidelity")
    class FidelityEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    TEACHER_ID_FIELD_NUMBER: _ClassVar[int]
    DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    SELECTION_FIELD_NUMBER: _ClassVar[int]
    QUERY_DRAWS_FIELD_NUMBER: _ClassVar[int]
    FIDELITY_FIELD_NUMBER: _ClassVar[int]
    teacher_id: str
    dimensions: int
    selection: str
    query_draws: int
    fidelity: _containers.ScalarMap[str, float]
    def __init__(self, teacher_id: _Optional[str] = ..., dimensions: _Optional[int] = ..., selection: _Optional[str] = ..., query_draws: _Optional[int] = ..., fidelity: _Optional[_Mapping[str, float]] = ...) -> None: ...

class ActiveRelease(_message.Message):
    __slots__ = ("release", "previous_release", "epoch", "update_time")
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_RELEASE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    UPDATE_TIME_FIELD_NUMBER: _ClassVar[int]
    release: str
    previous_release: str
    epoch: int
    update_time: _timestamp_pb2.Timestamp
    def __init__(self, release: _Optional[str] = ..., previous_release: _Optional[str] = ..., epoch: _Optional[int] = ..., update_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...
