import datetime

from google.api import field_behavior_pb2 as _field_behavior_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetCurationRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class PauseCurationRequest(_message.Message):
    __slots__ = ("model", "reason")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    model: str
    reason: str
    def __init__(self, model: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class ResumeCurationRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class SetCurationBudgetRequest(_message.Message):
    __slots__ = ("model", "budget", "reset")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    RESET_FIELD_NUMBER: _ClassVar[int]
    model: str
    budget: CurationBudget
    reset: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, model: _Optional[str] = ..., budget: _Optional[_Union[CurationBudget, _Mapping]] = ..., reset: _Optional[_Iterable[str]] = ...) -> None: ...

class CurationBudget(_message.Message):
    __slots__ = ("queries_per_hour", "gpu_share", "uniform_share", "repeat_share", "drift_share")
    QUERIES_PER_HOUR_FIELD_NUMBER: _ClassVar[int]
    GPU_SHARE_FIELD_NUMBER: _ClassVar[int]
    UNIFORM_SHARE_FIELD_NUMBER: _ClassVar[int]
    REPEAT_SHARE_FIELD_NUMBER: _ClassVar[int]
    DRIFT_SHARE_FIELD_NUMBER: _ClassVar[int]
    queries_per_hour: float
    gpu_share: float
    uniform_share: float
    repeat_share: float
    drift_share: float
    def __init__(self, queries_per_hour: _Optional[float] = ..., gpu_share: _Optional[float] = ..., uniform_share: _Optional[float] = ..., repeat_share: _Optional[float] = ..., drift_share: _Optional[float] = ...) -> None: ...

class Curation(_message.Message):
    __slots__ = ("model", "paused", "reason", "budget", "window", "window_queries", "window_worker_time", "workers", "open_jobs", "waiting_samples", "update_time", "rankings", "max_rankings")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    WINDOW_QUERIES_FIELD_NUMBER: _ClassVar[int]
    WINDOW_WORKER_TIME_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    OPEN_JOBS_FIELD_NUMBER: _ClassVar[int]
    WAITING_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    UPDATE_TIME_FIELD_NUMBER: _ClassVar[int]
    RANKINGS_FIELD_NUMBER: _ClassVar[int]
    MAX_RANKINGS_FIELD_NUMBER: _ClassVar[int]
    model: str
    paused: bool
    reason: str
    budget: CurationBudget
    window: _duration_pb2.Duration
    window_queries: int
    window_worker_time: _duration_pb2.Duration
    workers: int
    open_jobs: int
    waiting_samples: int
    update_time: _timestamp_pb2.Timestamp
    rankings: int
    max_rankings: int
    def __init__(self, model: _Optional[str] = ..., paused: _Optional[bool] = ..., reason: _Optional[str] = ..., budget: _Optional[_Union[CurationBudget, _Mapping]] = ..., window: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., window_queries: _Optional[int] = ..., window_worker_time: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., workers: _Optional[int] = ..., open_jobs: _Optional[int] = ..., waiting_samples: _Optional[int] = ..., update_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., rankings: _Optional[int] = ..., max_rankings: _Optional[int] = ...) -> None: ...

class Estimate(_message.Message):
    __slots__ = ("value", "low", "high", "queries")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    value: float
    low: float
    high: float
    queries: int
    def __init__(self, value: _Optional[float] = ..., low: _Optional[float] = ..., high: _Optional[float] = ..., queries: _Optional[int] = ...) -> None: ...

class GetLabelStatisticsRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class LabelStatistics(_message.Message):
    __slots__ = ("model", "by_split", "by_source", "by_purpose", "by_teacher", "repeat_overlap", "repeat_spearman", "pruning_loss", "missed_items")
    class BySplitEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class BySourceEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class ByPurposeEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class ByTeacherEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BY_SPLIT_FIELD_NUMBER: _ClassVar[int]
    BY_SOURCE_FIELD_NUMBER: _ClassVar[int]
    BY_PURPOSE_FIELD_NUMBER: _ClassVar[int]
    BY_TEACHER_FIELD_NUMBER: _ClassVar[int]
    REPEAT_OVERLAP_FIELD_NUMBER: _ClassVar[int]
    REPEAT_SPEARMAN_FIELD_NUMBER: _ClassVar[int]
    PRUNING_LOSS_FIELD_NUMBER: _ClassVar[int]
    MISSED_ITEMS_FIELD_NUMBER: _ClassVar[int]
    model: str
    by_split: _containers.ScalarMap[str, int]
    by_source: _containers.ScalarMap[str, int]
    by_purpose: _containers.ScalarMap[str, int]
    by_teacher: _containers.ScalarMap[str, int]
    repeat_overlap: Estimate
    repeat_spearman: Estimate
    pruning_loss: Estimate
    missed_items: Estimate
    def __init__(self, model: _Optional[str] = ..., by_split: _Optional[_Mapping[str, int]] = ..., by_source: _Optional[_Mapping[str, int]] = ..., by_purpose: _Optional[_Mapping[str, int]] = ..., by_teacher: _Optional[_Mapping[str, int]] = ..., repeat_overlap: _Optional[_Union[Estimate, _Mapping]] = ..., repeat_spearman: _Optional[_Union[Estimate, _Mapping]] = ..., pruning_loss: _Optional[_Union[Estimate, _Mapping]] = ..., missed_items: _Optional[_Union[Estimate, _Mapping]] = ...) -> None: ...

class GetDriftRequest(_message.Message):
    __slots__ = ("model", "window", "windows", "curated")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    WINDOWS_FIELD_NUMBER: _ClassVar[int]
    CURATED_FIELD_NUMBER: _ClassVar[int]
    model: str
    window: _duration_pb2.Duration
    windows: int
    curated: bool
    def __init__(self, model: _Optional[str] = ..., window: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., windows: _Optional[int] = ..., curated: _Optional[bool] = ...) -> None: ...

class Drift(_message.Message):
    __slots__ = ("model", "windows", "cluster_examples", "alarms")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WINDOWS_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    ALARMS_FIELD_NUMBER: _ClassVar[int]
    model: str
    windows: _containers.RepeatedCompositeFieldContainer[DriftWindow]
    cluster_examples: _containers.RepeatedScalarFieldContainer[str]
    alarms: _containers.RepeatedCompositeFieldContainer[DriftAlarm]
    def __init__(self, model: _Optional[str] = ..., windows: _Optional[_Iterable[_Union[DriftWindow, _Mapping]]] = ..., cluster_examples: _Optional[_Iterable[str]] = ..., alarms: _Optional[_Iterable[_Union[DriftAlarm, _Mapping]]] = ...) -> None: ...

class DriftWindow(_message.Message):
    __slots__ = ("start_time", "end_time", "cluster", "queries", "overlap", "spearman", "calibration")
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    END_TIME_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    OVERLAP_FIELD_NUMBER: _ClassVar[int]
    SPEARMAN_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_FIELD_NUMBER: _ClassVar[int]
    start_time: _timestamp_pb2.Timestamp
    end_time: _timestamp_pb2.Timestamp
    cluster: int
    queries: int
    overlap: Estimate
    spearman: Estimate
    calibration: Estimate
    def __init__(self, start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., end_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., cluster: _Optional[int] = ..., queries: _Optional[int] = ..., overlap: _Optional[_Union[Estimate, _Mapping]] = ..., spearman: _Optional[_Union[Estimate, _Mapping]] = ..., calibration: _Optional[_Union[Estimate, _Mapping]] = ...) -> None: ...

class DriftAlarm(_message.Message):
    __slots__ = ("id", "raise_time", "reason", "close_time", "closed_by")
    ID_FIELD_NUMBER: _ClassVar[int]
    RAISE_TIME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CLOSE_TIME_FIELD_NUMBER: _ClassVar[int]
    CLOSED_BY_FIELD_NUMBER: _ClassVar[int]
    id: int
    raise_time: _timestamp_pb2.Timestamp
    reason: str
    close_time: _timestamp_pb2.Timestamp
    closed_by: str
    def __init__(self, id: _Optional[int] = ..., raise_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., reason: _Optional[str] = ..., close_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., closed_by: _Optional[str] = ...) -> None: ...

class CloseDriftAlarmRequest(_message.Message):
    __slots__ = ("model", "id", "reason")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    model: str
    id: int
    reason: str
    def __init__(self, model: _Optional[str] = ..., id: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...
