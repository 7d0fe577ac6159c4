from rollmesh.v1 import reward_pb2 as _reward_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RunEpisodesRequest(_message.Message):
    __slots__ = ("episode_id", "reset", "step", "close", "deadline_ms")
    EPISODE_ID_FIELD_NUMBER: _ClassVar[int]
    RESET_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    episode_id: str
    reset: EpisodeReset
    step: EpisodeStep
    close: EpisodeClose
    deadline_ms: int
    def __init__(self, episode_id: _Optional[str] = ..., reset: _Optional[_Union[EpisodeReset, _Mapping]] = ..., step: _Optional[_Union[EpisodeStep, _Mapping]] = ..., close: _Optional[_Union[EpisodeClose, _Mapping]] = ..., deadline_ms: _Optional[int] = ...) -> None: ...

class EpisodeReset(_message.Message):
    __slots__ = ("prompt_text", "label_json", "datasource")
    PROMPT_TEXT_FIELD_NUMBER: _ClassVar[int]
    LABEL_JSON_FIELD_NUMBER: _ClassVar[int]
    DATASOURCE_FIELD_NUMBER: _ClassVar[int]
    prompt_text: str
    label_json: str
    datasource: str
    def __init__(self, prompt_text: _Optional[str] = ..., label_json: _Optional[str] = ..., datasource: _Optional[str] = ...) -> None: ...

class EpisodeStep(_message.Message):
    __slots__ = ("observation_text", "action_text")
    OBSERVATION_TEXT_FIELD_NUMBER: _ClassVar[int]
    ACTION_TEXT_FIELD_NUMBER: _ClassVar[int]
    observation_text: str
    action_text: str
    def __init__(self, observation_text: _Optional[str] = ..., action_text: _Optional[str] = ...) -> None: ...

class EpisodeClose(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RunEpisodesResponse(_message.Message):
    __slots__ = ("episode_id", "observation", "retryable", "invalid_sample", "policy_fault")
    EPISODE_ID_FIELD_NUMBER: _ClassVar[int]
    OBSERVATION_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    INVALID_SAMPLE_FIELD_NUMBER: _ClassVar[int]
    POLICY_FAULT_FIELD_NUMBER: _ClassVar[int]
    episode_id: str
    observation: Observation
    retryable: _reward_pb2.RetryableFailure
    invalid_sample: _reward_pb2.InvalidSample
    policy_fault: _reward_pb2.PolicyFault
    def __init__(self, episode_id: _Optional[str] = ..., observation: _Optional[_Union[Observation, _Mapping]] = ..., retryable: _Optional[_Union[_reward_pb2.RetryableFailure, _Mapping]] = ..., invalid_sample: _Optional[_Union[_reward_pb2.InvalidSample, _Mapping]] = ..., policy_fault: _Optional[_Union[_reward_pb2.PolicyFault, _Mapping]] = ...) -> None: ...

class Observation(_message.Message):
    __slots__ = ("text", "reward", "score", "done", "extra_logs")
    class ExtraLogsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    TEXT_FIELD_NUMBER: _ClassVar[int]
    REWARD_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    EXTRA_LOGS_FIELD_NUMBER: _ClassVar[int]
    text: str
    reward: float
    score: float
    done: bool
    extra_logs: _containers.ScalarMap[str, float]
    def __init__(self, text: _Optional[str] = ..., reward: _Optional[float] = ..., score: _Optional[float] = ..., done: bool = ..., extra_logs: _Optional[_Mapping[str, float]] = ...) -> None: ...
