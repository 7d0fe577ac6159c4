from rollmesh.v1 import trajectory_pb2 as _trajectory_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TensorSpec(_message.Message):
    __slots__ = ("name", "dtype", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class WeightPlan(_message.Message):
    __slots__ = ("tensors", "bucket_starts", "digest")
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    BUCKET_STARTS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    bucket_starts: _containers.RepeatedScalarFieldContainer[int]
    digest: bytes
    def __init__(self, tensors: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., bucket_starts: _Optional[_Iterable[int]] = ..., digest: _Optional[bytes] = ...) -> None: ...

class WeightEpoch(_message.Message):
    __slots__ = ("number", "store_host", "store_port", "world_size")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    STORE_HOST_FIELD_NUMBER: _ClassVar[int]
    STORE_PORT_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    number: int
    store_host: str
    store_port: int
    world_size: int
    def __init__(self, number: _Optional[int] = ..., store_host: _Optional[str] = ..., store_port: _Optional[int] = ..., world_size: _Optional[int] = ...) -> None: ...

class PrepareWeightsRequest(_message.Message):
    __slots__ = ("version", "plan", "epoch", "rank", "transfer_deadline_ms", "plan_digest")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    PLAN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    version: _trajectory_pb2.PolicyVersion
    plan: WeightPlan
    epoch: WeightEpoch
    rank: int
    transfer_deadline_ms: int
    plan_digest: bytes
    def __init__(self, version: _Optional[_Union[_trajectory_pb2.PolicyVersion, _Mapping]] = ..., plan: _Optional[_Union[WeightPlan, _Mapping]] = ..., epoch: _Optional[_Union[WeightEpoch, _Mapping]] = ..., rank: _Optional[int] = ..., transfer_deadline_ms: _Optional[int] = ..., plan_digest: _Optional[bytes] = ...) -> None: ...

class PrepareWeightsResponse(_message.Message):
    __slots__ = ("needs_plan",)
    NEEDS_PLAN_FIELD_NUMBER: _ClassVar[int]
    needs_plan: bool
    def __init__(self, needs_plan: bool = ...) -> None: ...

class ReceiveWeightsRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: _trajectory_pb2.PolicyVersion
    def __init__(self, version: _Optional[_Union[_trajectory_pb2.PolicyVersion, _Mapping]] = ...) -> None: ...

class ReceiveWeightsResponse(_message.Message):
    __slots__ = ("digests", "num_bytes", "transfer_s")
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    digests: _containers.RepeatedScalarFieldContainer[bytes]
    num_bytes: int
    transfer_s: float
    def __init__(self, digests: _Optional[_Iterable[bytes]] = ..., num_bytes: _Optional[int] = ..., transfer_s: _Optional[float] = ...) -> None: ...

class CommitWeightsRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: _trajectory_pb2.PolicyVersion
    def __init__(self, version: _Optional[_Union[_trajectory_pb2.PolicyVersion, _Mapping]] = ...) -> None: ...

class CommitWeightsResponse(_message.Message):
    __slots__ = ("pause_s", "load_s")
    PAUSE_S_FIELD_NUMBER: _ClassVar[int]
    LOAD_S_FIELD_NUMBER: _ClassVar[int]
    pause_s: float
    load_s: float
    def __init__(self, pause_s: _Optional[float] = ..., load_s: _Optional[float] = ...) -> None: ...

class AbortWeightsRequest(_message.Message):
    __slots__ = ("version", "reason")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    version: _trajectory_pb2.PolicyVersion
    reason: str
    def __init__(self, version: _Optional[_Union[_trajectory_pb2.PolicyVersion, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class AbortWeightsResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetRolloutStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetRolloutStatusResponse(_message.Message):
    __slots__ = ("version", "num_groups_open", "num_samples_generating", "num_samples_scoring", "num_generated_tokens", "num_groups_committed")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_GROUPS_OPEN_FIELD_NUMBER: _ClassVar[int]
    NUM_SAMPLES_GENERATING_FIELD_NUMBER: _ClassVar[int]
    NUM_SAMPLES_SCORING_FIELD_NUMBER: _ClassVar[int]
    NUM_GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_GROUPS_COMMITTED_FIELD_NUMBER: _ClassVar[int]
    version: _trajectory_pb2.PolicyVersion
    num_groups_open: int
    num_samples_generating: int
    num_samples_scoring: int
    num_generated_tokens: int
    num_groups_committed: int
    def __init__(self, version: _Optional[_Union[_trajectory_pb2.PolicyVersion, _Mapping]] = ..., num_groups_open: _Optional[int] = ..., num_samples_generating: _Optional[int] = ..., num_samples_scoring: _Optional[int] = ..., num_generated_tokens: _Optional[int] = ..., num_groups_committed: _Optional[int] = ...) -> None: ...
