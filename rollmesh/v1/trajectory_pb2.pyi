from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StopReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STOP_REASON_UNSPECIFIED: _ClassVar[StopReason]
    STOP_REASON_STOP: _ClassVar[StopReason]
    STOP_REASON_LENGTH: _ClassVar[StopReason]
    STOP_REASON_ENVIRONMENT: _ClassVar[StopReason]
    STOP_REASON_ABORTED: _ClassVar[StopReason]
STOP_REASON_UNSPECIFIED: StopReason
STOP_REASON_STOP: StopReason
STOP_REASON_LENGTH: StopReason
STOP_REASON_ENVIRONMENT: StopReason
STOP_REASON_ABORTED: StopReason

class PolicyVersion(_message.Message):
    __slots__ = ("lineage", "number")
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    lineage: int
    number: int
    def __init__(self, lineage: _Optional[int] = ..., number: _Optional[int] = ...) -> None: ...

class VersionSpan(_message.Message):
    __slots__ = ("version", "start", "length")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    version: PolicyVersion
    start: int
    length: int
    def __init__(self, version: _Optional[_Union[PolicyVersion, _Mapping]] = ..., start: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class PromptId(_message.Message):
    __slots__ = ("dataset", "epoch", "index")
    DATASET_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    dataset: str
    epoch: int
    index: int
    def __init__(self, dataset: _Optional[str] = ..., epoch: _Optional[int] = ..., index: _Optional[int] = ...) -> None: ...

class Turn(_message.Message):
    __slots__ = ("num_generated_tokens", "num_environment_tokens", "stop_reason")
    NUM_GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_ENVIRONMENT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_REASON_FIELD_NUMBER: _ClassVar[int]
    num_generated_tokens: int
    num_environment_tokens: int
    stop_reason: StopReason
    def __init__(self, num_generated_tokens: _Optional[int] = ..., num_environment_tokens: _Optional[int] = ..., stop_reason: _Optional[_Union[StopReason, str]] = ...) -> None: ...

class Sample(_message.Message):
    __slots__ = ("sample_id", "index", "prompt_id", "prompt_token_ids", "response_token_ids", "turns", "behaviour_logprobs", "version_spans")
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    PROMPT_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TURNS_FIELD_NUMBER: _ClassVar[int]
    BEHAVIOUR_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    VERSION_SPANS_FIELD_NUMBER: _ClassVar[int]
    sample_id: str
    index: int
    prompt_id: PromptId
    prompt_token_ids: bytes
    response_token_ids: bytes
    turns: _containers.RepeatedCompositeFieldContainer[Turn]
    behaviour_logprobs: bytes
    version_spans: _containers.RepeatedCompositeFieldContainer[VersionSpan]
    def __init__(self, sample_id: _Optional[str] = ..., index: _Optional[int] = ..., prompt_id: _Optional[_Union[PromptId, _Mapping]] = ..., prompt_token_ids: _Optional[bytes] = ..., response_token_ids: _Optional[bytes] = ..., turns: _Optional[_Iterable[_Union[Turn, _Mapping]]] = ..., behaviour_logprobs: _Optional[bytes] = ..., version_spans: _Optional[_Iterable[_Union[VersionSpan, _Mapping]]] = ...) -> None: ...
