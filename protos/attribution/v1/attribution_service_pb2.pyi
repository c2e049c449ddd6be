import datetime

from attribution.v1 import attribution_job_pb2 as _attribution_job_pb2
from google.api import field_behavior_pb2 as _field_behavior_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class JobView(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOB_VIEW_UNSPECIFIED: _ClassVar[JobView]
    JOB_VIEW_BASIC: _ClassVar[JobView]
    JOB_VIEW_FULL: _ClassVar[JobView]
JOB_VIEW_UNSPECIFIED: JobView
JOB_VIEW_BASIC: JobView
JOB_VIEW_FULL: JobView

class Image(_message.Message):
    __slots__ = ("name", "media_type", "size_bytes", "width", "height")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MEDIA_TYPE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    name: str
    media_type: str
    size_bytes: int
    width: int
    height: int
    def __init__(self, name: _Optional[str] = ..., media_type: _Optional[str] = ..., size_bytes: _Optional[int] = ..., width: _Optional[int] = ..., height: _Optional[int] = ...) -> None: ...

class CreateAttributionJobRequest(_message.Message):
    __slots__ = ("parent", "attribution_job", "request_id", "validate_only")
    PARENT_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTION_JOB_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    VALIDATE_ONLY_FIELD_NUMBER: _ClassVar[int]
    parent: str
    attribution_job: _attribution_job_pb2.AttributionJob
    request_id: str
    validate_only: bool
    def __init__(self, parent: _Optional[str] = ..., attribution_job: _Optional[_Union[_attribution_job_pb2.AttributionJob, _Mapping]] = ..., request_id: _Optional[str] = ..., validate_only: _Optional[bool] = ...) -> None: ...

class BatchCreateAttributionJobsRequest(_message.Message):
    __slots__ = ("parent", "requests")
    PARENT_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    parent: str
    requests: _containers.RepeatedCompositeFieldContainer[CreateAttributionJobRequest]
    def __init__(self, parent: _Optional[str] = ..., requests: _Optional[_Iterable[_Union[CreateAttributionJobRequest, _Mapping]]] = ...) -> None: ...

class BatchCreateAttributionJobsResponse(_message.Message):
    __slots__ = ("attribution_jobs",)
    ATTRIBUTION_JOBS_FIELD_NUMBER: _ClassVar[int]
    attribution_jobs: _containers.RepeatedCompositeFieldContainer[_attribution_job_pb2.AttributionJob]
    def __init__(self, attribution_jobs: _Optional[_Iterable[_Union[_attribution_job_pb2.AttributionJob, _Mapping]]] = ...) -> None: ...

class GetAttributionJobRequest(_message.Message):
    __slots__ = ("name", "view")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VIEW_FIELD_NUMBER: _ClassVar[int]
    name: str
    view: JobView
    def __init__(self, name: _Optional[str] = ..., view: _Optional[_Union[JobView, str]] = ...) -> None: ...

class ListAttributionJobsRequest(_message.Message):
    __slots__ = ("parent", "page_size", "page_token", "states", "view")
    PARENT_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    VIEW_FIELD_NUMBER: _ClassVar[int]
    parent: str
    page_size: int
    page_token: str
    states: _containers.RepeatedScalarFieldContainer[_attribution_job_pb2.AttributionJob.State]
    view: JobView
    def __init__(self, parent: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., states: _Optional[_Iterable[_Union[_attribution_job_pb2.AttributionJob.State, str]]] = ..., view: _Optional[_Union[JobView, str]] = ...) -> None: ...

class ListAttributionJobsResponse(_message.Message):
    __slots__ = ("attribution_jobs", "next_page_token")
    ATTRIBUTION_JOBS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    attribution_jobs: _containers.RepeatedCompositeFieldContainer[_attribution_job_pb2.AttributionJob]
    next_page_token: str
    def __init__(self, attribution_jobs: _Optional[_Iterable[_Union[_attribution_job_pb2.AttributionJob, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class CancelAttributionJobRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class WatchAttributionJobRequest(_message.Message):
    __slots__ = ("name", "view")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VIEW_FIELD_NUMBER: _ClassVar[int]
    name: str
    view: JobView
    def __init__(self, name: _Optional[str] = ..., view: _Optional[_Union[JobView, str]] = ...) -> None: ...

class WatchAttributionJobResponse(_message.Message):
    __slots__ = ("attribution_job", "read_time")
    ATTRIBUTION_JOB_FIELD_NUMBER: _ClassVar[int]
    READ_TIME_FIELD_NUMBER: _ClassVar[int]
    attribution_job: _attribution_job_pb2.AttributionJob
    read_time: _timestamp_pb2.Timestamp
    def __init__(self, attribution_job: _Optional[_Union[_attribution_job_pb2.AttributionJob, _Mapping]] = ..., read_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class AttributeRequest(_message.Message):
    __slots__ = ("parent", "model", "query", "options", "request_id", "wait")
    PARENT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    QUERY_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    parent: str
    model: str
    query: _attribution_job_pb2.Query
    options: _attribution_job_pb2.JobOptions
    request_id: str
    wait: _duration_pb2.Duration
    def __init__(self, parent: _Optional[str] = ..., model: _Optional[str] = ..., query: _Optional[_Union[_attribution_job_pb2.Query, _Mapping]] = ..., options: _Optional[_Union[_attribution_job_pb2.JobOptions, _Mapping]] = ..., request_id: _Optional[str] = ..., wait: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class AttributeResponse(_message.Message):
    __slots__ = ("attribution_job",)
    ATTRIBUTION_JOB_FIELD_NUMBER: _ClassVar[int]
    attribution_job: _attribution_job_pb2.AttributionJob
    def __init__(self, attribution_job: _Optional[_Union[_attribution_job_pb2.AttributionJob, _Mapping]] = ...) -> None: ...

class UploadImageRequest(_message.Message):
    __slots__ = ("metadata", "chunk")
    class Metadata(_message.Message):
        __slots__ = ("parent", "size_bytes", "sha256", "offset")
        PARENT_FIELD_NUMBER: _ClassVar[int]
        SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
        SHA256_FIELD_NUMBER: _ClassVar[int]
        OFFSET_FIELD_NUMBER: _ClassVar[int]
        parent: str
        size_bytes: int
        sha256: str
        offset: int
        def __init__(self, parent: _Optional[str] = ..., size_bytes: _Optional[int] = ..., sha256: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...
    METADATA_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    metadata: UploadImageRequest.Metadata
    chunk: bytes
    def __init__(self, metadata: _Optional[_Union[UploadImageRequest.Metadata, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class GetImageUploadRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ImageUpload(_message.Message):
    __slots__ = ("name", "committed_bytes", "image")
    NAME_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    name: str
    committed_bytes: int
    image: Image
    def __init__(self, name: _Optional[str] = ..., committed_bytes: _Optional[int] = ..., image: _Optional[_Union[Image, _Mapping]] = ...) -> None: ...

class DeleteAttributionJobRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DeleteAttributionJobResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DownloadQueryImageRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DownloadQueryImageResponse(_message.Message):
    __slots__ = ("image", "chunk")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    image: Image
    chunk: bytes
    def __init__(self, image: _Optional[_Union[Image, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...
