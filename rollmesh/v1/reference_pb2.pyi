from rollmesh.v1 import reward_pb2 as _reward_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ComputeLogProbsRequest(_message.Message):
    __slots__ = ("request_id", "token_ids", "num_prompt_tokens", "temperature")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token_ids: bytes
    num_prompt_tokens: int
    temperature: float
    def __init__(self, request_id: _Optional[str] = ..., token_ids: _Optional[bytes] = ..., num_prompt_tokens: _Optional[int] = ..., temperature: _Optional[float] = ...) -> None: ...

class ComputeLogProbsResponse(_message.Message):
    __slots__ = ("request_id", "logprobs", "retryable", "invalid_sample")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    INVALID_SAMPLE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    logprobs: bytes
    retryable: _reward_pb2.RetryableFailure
    invalid_sample: _reward_pb2.InvalidSample
    def __init__(self, request_id: _Optional[str] = ..., logprobs: _Optional[bytes] = ..., retryable: _Optional[_Union[_reward_pb2.RetryableFailure, _Mapping]] = ..., invalid_sample: _Optional[_Union[_reward_pb2.InvalidSample, _Mapping]] = ...) -> None: ...
