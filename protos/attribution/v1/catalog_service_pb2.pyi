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

class Model(_message.Message):
    __slots__ = ("name", "corpus", "revision")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CORPUS_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    name: str
    corpus: str
    revision: str
    def __init__(self, name: _Optional[str] = ..., corpus: _Optional[str] = ..., revision: _Optional[str] = ...) -> None: ...

class Item(_message.Message):
    __slots__ = ("name", "item_id", "caption", "keywords", "creator", "licence", "source", "source_path", "image_sha256", "near_duplicate_group")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    CAPTION_FIELD_NUMBER: _ClassVar[int]
    KEYWORDS_FIELD_NUMBER: _ClassVar[int]
    CREATOR_FIELD_NUMBER: _ClassVar[int]
    LICENCE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_PATH_FIELD_NUMBER: _ClassVar[int]
    IMAGE_SHA256_FIELD_NUMBER: _ClassVar[int]
    NEAR_DUPLICATE_GROUP_FIELD_NUMBER: _ClassVar[int]
    name: str
    item_id: int
    caption: str
    keywords: _containers.RepeatedScalarFieldContainer[str]
    creator: str
    licence: str
    source: str
    source_path: str
    image_sha256: str
    near_duplicate_group: int
    def __init__(self, name: _Optional[str] = ..., item_id: _Optional[int] = ..., caption: _Optional[str] = ..., keywords: _Optional[_Iterable[str]] = ..., creator: _Optional[str] = ..., licence: _Optional[str] = ..., source: _Optional[str] = ..., source_path: _Optional[str] = ..., image_sha256: _Optional[str] = ..., near_duplicate_group: _Optional[int] = ...) -> None: ...

class ItemImage(_message.Message):
    __slots__ = ("media_type", "data")
    MEDIA_TYPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    media_type: str
    data: bytes
    def __init__(self, media_type: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class WithdrawalReceipt(_message.Message):
    __slots__ = ("corpus", "withdrawn_item_ids", "already_withdrawn_item_ids", "unknown_item_ids", "effective_time", "name", "creator", "licence", "reason", "purge_time", "absent_releases")
    CORPUS_FIELD_NUMBER: _ClassVar[int]
    WITHDRAWN_ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    ALREADY_WITHDRAWN_ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    EFFECTIVE_TIME_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    CREATOR_FIELD_NUMBER: _ClassVar[int]
    LICENCE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PURGE_TIME_FIELD_NUMBER: _ClassVar[int]
    ABSENT_RELEASES_FIELD_NUMBER: _ClassVar[int]
    corpus: str
    withdrawn_item_ids: _containers.RepeatedScalarFieldContainer[int]
    already_withdrawn_item_ids: _containers.RepeatedScalarFieldContainer[int]
    unknown_item_ids: _containers.RepeatedScalarFieldContainer[int]
    effective_time: _timestamp_pb2.Timestamp
    name: str
    creator: str
    licence: str
    reason: str
    purge_time: _timestamp_pb2.Timestamp
    absent_releases: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, corpus: _Optional[str] = ..., withdrawn_item_ids: _Optional[_Iterable[int]] = ..., already_withdrawn_item_ids: _Optional[_Iterable[int]] = ..., unknown_item_ids: _Optional[_Iterable[int]] = ..., effective_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., name: _Optional[str] = ..., creator: _Optional[str] = ..., licence: _Optional[str] = ..., reason: _Optional[str] = ..., purge_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., absent_releases: _Optional[_Iterable[str]] = ...) -> None: ...

class NewItem(_message.Message):
    __slots__ = ("image", "caption", "keywords", "creator", "licence", "source", "source_path", "item_id")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    CAPTION_FIELD_NUMBER: _ClassVar[int]
    KEYWORDS_FIELD_NUMBER: _ClassVar[int]
    CREATOR_FIELD_NUMBER: _ClassVar[int]
    LICENCE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_PATH_FIELD_NUMBER: _ClassVar[int]
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    image: bytes
    caption: str
    keywords: _containers.RepeatedScalarFieldContainer[str]
    creator: str
    licence: str
    source: str
    source_path: str
    item_id: int
    def __init__(self, image: _Optional[bytes] = ..., caption: _Optional[str] = ..., keywords: _Optional[_Iterable[str]] = ..., creator: _Optional[str] = ..., licence: _Optional[str] = ..., source: _Optional[str] = ..., source_path: _Optional[str] = ..., item_id: _Optional[int] = ...) -> None: ...

class AddItemsRequest(_message.Message):
    __slots__ = ("parent", "items")
    PARENT_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    parent: str
    items: _containers.RepeatedCompositeFieldContainer[NewItem]
    def __init__(self, parent: _Optional[str] = ..., items: _Optional[_Iterable[_Union[NewItem, _Mapping]]] = ...) -> None: ...

class AddItemsResponse(_message.Message):
    __slots__ = ("results", "corpus_sequence")
    class Result(_message.Message):
        __slots__ = ("outcome", "item_id", "near_duplicate_group", "reason")
        class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
            __slots__ = ()
            OUTCOME_UNSPECIFIED: _ClassVar[AddItemsResponse.Result.Outcome]
            OUTCOME_ADDED: _ClassVar[AddItemsResponse.Result.Outcome]
            OUTCOME_UNCHANGED: _ClassVar[AddItemsResponse.Result.Outcome]
            OUTCOME_REFUSED: _ClassVar[AddItemsResponse.Result.Outcome]
        OUTCOME_UNSPECIFIED: AddItemsResponse.Result.Outcome
        OUTCOME_ADDED: AddItemsResponse.Result.Outcome
        OUTCOME_UNCHANGED: AddItemsResponse.Result.Outcome
        OUTCOME_REFUSED: AddItemsResponse.Result.Outcome
        OUTCOME_FIELD_NUMBER: _ClassVar[int]
        ITEM_ID_FIELD_NUMBER: _ClassVar[int]
        NEAR_DUPLICATE_GROUP_FIELD_NUMBER: _ClassVar[int]
        REASON_FIELD_NUMBER: _ClassVar[int]
        outcome: AddItemsResponse.Result.Outcome
        item_id: int
        near_duplicate_group: int
        reason: str
        def __init__(self, outcome: _Optional[_Union[AddItemsResponse.Result.Outcome, str]] = ..., item_id: _Optional[int] = ..., near_duplicate_group: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    CORPUS_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[AddItemsResponse.Result]
    corpus_sequence: int
    def __init__(self, results: _Optional[_Iterable[_Union[AddItemsResponse.Result, _Mapping]]] = ..., corpus_sequence: _Optional[int] = ...) -> None: ...

class GetCorpusRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class Corpus(_message.Message):
    __slots__ = ("name", "items", "withdrawn_items", "creators", "sequence", "coverages")
    class Coverage(_message.Message):
        __slots__ = ("model", "release", "delta_sequence", "delta_items", "corpus_sequence")
        MODEL_FIELD_NUMBER: _ClassVar[int]
        RELEASE_FIELD_NUMBER: _ClassVar[int]
        DELTA_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
        DELTA_ITEMS_FIELD_NUMBER: _ClassVar[int]
        CORPUS_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
        model: str
        release: str
        delta_sequence: int
        delta_items: int
        corpus_sequence: int
        def __init__(self, model: _Optional[str] = ..., release: _Optional[str] = ..., delta_sequence: _Optional[int] = ..., delta_items: _Optional[int] = ..., corpus_sequence: _Optional[int] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    WITHDRAWN_ITEMS_FIELD_NUMBER: _ClassVar[int]
    CREATORS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    COVERAGES_FIELD_NUMBER: _ClassVar[int]
    name: str
    items: int
    withdrawn_items: int
    creators: int
    sequence: int
    coverages: _containers.RepeatedCompositeFieldContainer[Corpus.Coverage]
    def __init__(self, name: _Optional[str] = ..., items: _Optional[int] = ..., withdrawn_items: _Optional[int] = ..., creators: _Optional[int] = ..., sequence: _Optional[int] = ..., coverages: _Optional[_Iterable[_Union[Corpus.Coverage, _Mapping]]] = ...) -> None: ...

class GetWithdrawalRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class BatchGetItemsRequest(_message.Message):
    __slots__ = ("parent", "item_ids")
    PARENT_FIELD_NUMBER: _ClassVar[int]
    ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    parent: str
    item_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, parent: _Optional[str] = ..., item_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class BatchGetItemsResponse(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[Item]
    def __init__(self, items: _Optional[_Iterable[_Union[Item, _Mapping]]] = ...) -> None: ...

class GetItemImageRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class WithdrawItemsRequest(_message.Message):
    __slots__ = ("parent", "item_ids", "reason", "creator", "licence")
    PARENT_FIELD_NUMBER: _ClassVar[int]
    ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CREATOR_FIELD_NUMBER: _ClassVar[int]
    LICENCE_FIELD_NUMBER: _ClassVar[int]
    parent: str
    item_ids: _containers.RepeatedScalarFieldContainer[int]
    reason: str
    creator: str
    licence: str
    def __init__(self, parent: _Optional[str] = ..., item_ids: _Optional[_Iterable[int]] = ..., reason: _Optional[str] = ..., creator: _Optional[str] = ..., licence: _Optional[str] = ...) -> None: ...
