from rollmesh.v1 import trajectory_pb2 as _trajectory_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetRewardInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetRewardInfoResponse(_message.Message):
    __slots__ = ("name", "max_in_flight")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MAX_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    name: str
    max_in_flight: int
    def __init__(self, name: _Optional[str] = ..., max_in_flight: _Optional[int] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("request_id", "sample", "prompt_text", "query_text", "label_json", "datasource", "deadline_ms")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TEXT_FIELD_NUMBER: _ClassVar[int]
    QUERY_TEXT_FIELD_NUMBER: _ClassVar[int]
    LABEL_JSON_FIELD_NUMBER: _ClassVar[int]
    DATASOURCE_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    sample: _trajectory_pb2.Sample
    prompt_text: str
    query_text: str
    label_json: str
    datasource: str
    deadline_ms: int
    def __init__(self, request_id: _Optional[str] = ..., sample: _Optional[_Union[_trajectory_pb2.Sample, _Mapping]] = ..., prompt_text: _Optional[str] = ..., query_text: _Optional[str] = ..., label_json: _Optional[str] = ..., datasource: _Optional[str] = ..., deadline_ms: _Optional[int] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("request_id", "score", "retryable", "invalid_sample", "policy_fault")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    INVALID_SAMPLE_FIELD_NUMBER: _ClassVar[int]
    POLICY_FAULT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    score: Score
    retryable: RetryableFailure
    invalid_sample: InvalidSample
    policy_fault: PolicyFault
    def __init__(self, request_id: _Optional[str] = ..., score: _Optional[_Union[Score, _Mapping]] = ..., retryable: _Optional[_Union[RetryableFailure, _Mapping]] = ..., invalid_sample: _Optional[_Union[InvalidSample, _Mapping]] = ..., policy_fault: _Optional[_Union[PolicyFault, _Mapping]] = ...) -> None: ...

class Score(_message.Message):
    __slots__ = ("reward", "score", "extra_logs")
    class ExtraLogsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    REWARD_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    EXTRA_LOGS_FIELD_NUMBER: _ClassVar[int]
    reward: float
    score: float
    extra_logs: _containers.ScalarMap[str, float]
    def __init__(self, reward: _Optional[float] = ..., score: _Optional[float] = ..., extra_logs: _Optional[_Mapping[str, float]] = ...) -> None: ...

class RetryableFailure(_message.Message):
    __slots__ = ("reason", "retry_after_ms")
    REASON_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    reason: str
    retry_after_ms: int
    def __init__(self, reason: _Optional[str] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class InvalidSample(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class PolicyFault(_message.Message):
    __slots__ = ("reason", "penalty")
    REASON_FIELD_NUMBER: _ClassVar[int]
    PENALTY_FIELD_NUMBER: _ClassVar[int]
    reason: str
    penalty: float
    def __init__(self, reason: _Optional[str] = ..., penalty: _Optional[float] = ...) -> None: ...
