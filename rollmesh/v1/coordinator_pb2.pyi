from rollmesh.v1 import learner_pb2 as _learner_pb2
from rollmesh.v1 import rollout_pb2 as _rollout_pb2
from rollmesh.v1 import trajectory_pb2 as _trajectory_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_ROLLOUT: _ClassVar[Role]
    ROLE_REWARD: _ClassVar[Role]
    ROLE_REFERENCE: _ClassVar[Role]
    ROLE_LEARNER: _ClassVar[Role]

class RunState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RUN_STATE_UNSPECIFIED: _ClassVar[RunState]
    RUN_STATE_STARTING: _ClassVar[RunState]
    RUN_STATE_RUNNING: _ClassVar[RunState]
    RUN_STATE_FINISHING: _ClassVar[RunState]
    RUN_STATE_FINISHED: _ClassVar[RunState]
    RUN_STATE_FAILED: _ClassVar[RunState]

class LeaseKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LEASE_KIND_UNSPECIFIED: _ClassVar[LeaseKind]
    LEASE_KIND_TRAIN: _ClassVar[LeaseKind]
    LEASE_KIND_EVALUATE: _ClassVar[LeaseKind]
ROLE_UNSPECIFIED: Role
ROLE_ROLLOUT: Role
ROLE_REWARD: Role
ROLE_REFERENCE: Role
ROLE_LEARNER: Role
RUN_STATE_UNSPECIFIED: RunState
RUN_STATE_STARTING: RunState
RUN_STATE_RUNNING: RunState
RUN_STATE_FINISHING: RunState
RUN_STATE_FINISHED: RunState
RUN_STATE_FAILED: RunState
LEASE_KIND_UNSPECIFIED: LeaseKind
LEASE_KIND_TRAIN: LeaseKind
LEASE_KIND_EVALUATE: LeaseKind

class RegisterRequest(_message.Message):
    __slots__ = ("run_id", "role", "name", "incarnation", "address", "num_weight_ranks", "serving")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUM_WEIGHT_RANKS_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    role: Role
    name: str
    incarnation: str
    address: str
    num_weight_ranks: int
    serving: _trajectory_pb2.PolicyVersion
    def __init__(self, run_id: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., name: _Optional[str] = ..., incarnation: _Optional[str] = ..., address: _Optional[str] = ..., num_weight_ranks: _Optional[int] = ..., serving: _Optional[_Union[_trajectory_pb2.PolicyVersion, _Mapping]] = ...) -> None: ...

class RegisterResponse(_message.Message):
    __slots__ = ("heartbeat_interval_ms", "member_timeout_ms", "committed_version", "groups_per_batch", "num_steps", "newest_version")
    HEARTBEAT_INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    MEMBER_TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_VERSION_FIELD_NUMBER: _ClassVar[int]
    GROUPS_PER_BATCH_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NEWEST_VERSION_FIELD_NUMBER: _ClassVar[int]
    heartbeat_interval_ms: int
    member_timeout_ms: int
    committed_version: _trajectory_pb2.PolicyVersion
    groups_per_batch: int
    num_steps: int
    newest_version: _trajectory_pb2.PolicyVersion
    def __init__(self, heartbeat_interval_ms: _Optional[int] = ..., member_timeout_ms: _Optional[int] = ..., committed_version: _Optional[_Union[_trajectory_pb2.PolicyVersion, _Mapping]] = ..., groups_per_batch: _Optional[int] = ..., num_steps: _Optional[int] = ..., newest_version: _Optional[_Union[_trajectory_pb2.PolicyVersion, _Mapping]] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("name", "incarnation", "num_generated_tokens", "num_moves", "patience_ms", "phase", "renewals")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NUM_GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_MOVES_FIELD_NUMBER: _ClassVar[int]
    PATIENCE_MS_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    RENEWALS_FIELD_NUMBER: _ClassVar[int]
    name: str
    incarnation: str
    num_generated_tokens: int
    num_moves: int
    patience_ms: int
    phase: _learner_pb2.LearnerPhase
    renewals: _containers.RepeatedCompositeFieldContainer[LeaseKey]
    def __init__(self, name: _Optional[str] = ..., incarnation: _Optional[str] = ..., num_generated_tokens: _Optional[int] = ..., num_moves: _Optional[int] = ..., patience_ms: _Optional[int] = ..., phase: _Optional[_Union[_learner_pb2.LearnerPhase, str]] = ..., renewals: _Optional[_Iterable[_Union[LeaseKey, _Mapping]]] = ...) -> None: ...

class LeaseKey(_message.Message):
    __slots__ = ("kind", "group_id", "fencing_token")
    KIND_FIELD_NUMBER: _ClassVar[int]
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    FENCING_TOKEN_FIELD_NUMBER: _ClassVar[int]
    kind: LeaseKind
    group_id: str
    fencing_token: int
    def __init__(self, kind: _Optional[_Union[LeaseKind, str]] = ..., group_id: _Optional[str] = ..., fencing_token: _Optional[int] = ...) -> None: ...

class HeartbeatResponse(_message.Message):
    __slots__ = ("run_state", "committed_version", "failure", "ended", "interval_ms", "should_publish")
    RUN_STATE_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_VERSION_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    SHOULD_PUBLISH_FIELD_NUMBER: _ClassVar[int]
    run_state: RunState
    committed_version: _trajectory_pb2.PolicyVersion
    failure: str
    ended: _containers.RepeatedCompositeFieldContainer[LeaseKey]
    interval_ms: int
    should_publish: bool
    def __init__(self, run_state: _Optional[_Union[RunState, str]] = ..., committed_version: _Optional[_Union[_trajectory_pb2.PolicyVersion, _Mapping]] = ..., failure: _Optional[str] = ..., ended: _Optional[_Iterable[_Union[LeaseKey, _Mapping]]] = ..., interval_ms: _Optional[int] = ..., should_publish: bool = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ("name", "incarnation", "failure", "is_replaceable")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    IS_REPLACEABLE_FIELD_NUMBER: _ClassVar[int]
    name: str
    incarnation: str
    failure: str
    is_replaceable: bool
    def __init__(self, name: _Optional[str] = ..., incarnation: _Optional[str] = ..., failure: _Optional[str] = ..., is_replaceable: bool = ...) -> None: ...

class LeaveResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FailRunRequest(_message.Message):
    __slots__ = ("run_id", "reason")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    reason: str
    def __init__(self, run_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class FailRunResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LeaseRequest(_message.Message):
    __slots__ = ("name", "incarnation", "credits")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    name: str
    incarnation: str
    credits: int
    def __init__(self, name: _Optional[str] = ..., incarnation: _Optional[str] = ..., credits: _Optional[int] = ...) -> None: ...

class SamplingSpec(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "max_new_tokens", "seed")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    seed: int
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., seed: _Optional[int] = ...) -> None: ...

class LeaseResponse(_message.Message):
    __slots__ = ("group_id", "fencing_token", "kind", "prompt_id", "sequence", "attempt", "num_samples", "prompt_json", "label_json", "datasource", "sampling", "ttl_ms")
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    FENCING_TOKEN_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    PROMPT_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NUM_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_JSON_FIELD_NUMBER: _ClassVar[int]
    LABEL_JSON_FIELD_NUMBER: _ClassVar[int]
    DATASOURCE_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    group_id: str
    fencing_token: int
    kind: LeaseKind
    prompt_id: _trajectory_pb2.PromptId
    sequence: int
    attempt: int
    num_samples: int
    prompt_json: str
    label_json: str
    datasource: str
    sampling: SamplingSpec
    ttl_ms: int
    def __init__(self, group_id: _Optional[str] = ..., fencing_token: _Optional[int] = ..., kind: _Optional[_Union[LeaseKind, str]] = ..., prompt_id: _Optional[_Union[_trajectory_pb2.PromptId, _Mapping]] = ..., sequence: _Optional[int] = ..., attempt: _Optional[int] = ..., num_samples: _Optional[int] = ..., prompt_json: _Optional[str] = ..., label_json: _Optional[str] = ..., datasource: _Optional[str] = ..., sampling: _Optional[_Union[SamplingSpec, _Mapping]] = ..., ttl_ms: _Optional[int] = ...) -> None: ...

class EvaluationSample(_message.Message):
    __slots__ = ("reward", "score", "num_generated_tokens", "stop_reason", "oldest_version", "newest_version", "extra_logs")
    class ExtraLogsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    REWARD_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    NUM_GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_REASON_FIELD_NUMBER: _ClassVar[int]
    OLDEST_VERSION_FIELD_NUMBER: _ClassVar[int]
    NEWEST_VERSION_FIELD_NUMBER: _ClassVar[int]
    EXTRA_LOGS_FIELD_NUMBER: _ClassVar[int]
    reward: float
    score: float
    num_generated_tokens: int
    stop_reason: _trajectory_pb2.StopReason
    oldest_version: _trajectory_pb2.PolicyVersion
    newest_version: _trajectory_pb2.PolicyVersion
    extra_logs: _containers.ScalarMap[str, float]
    def __init__(self, reward: _Optional[float] = ..., score: _Optional[float] = ..., num_generated_tokens: _Optional[int] = ..., stop_reason: _Optional[_Union[_trajectory_pb2.StopReason, str]] = ..., oldest_version: _Optional[_Union[_trajectory_pb2.PolicyVersion, _Mapping]] = ..., newest_version: _Optional[_Union[_trajectory_pb2.PolicyVersion, _Mapping]] = ..., extra_logs: _Optional[_Mapping[str, float]] = ...) -> None: ...

class ReportEvaluationRequest(_message.Message):
    __slots__ = ("name", "incarnation", "group_id", "fencing_token", "samples", "failure")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    FENCING_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    name: str
    incarnation: str
    group_id: str
    fencing_token: int
    samples: _containers.RepeatedCompositeFieldContainer[EvaluationSample]
    failure: str
    def __init__(self, name: _Optional[str] = ..., incarnation: _Optional[str] = ..., group_id: _Optional[str] = ..., fencing_token: _Optional[int] = ..., samples: _Optional[_Iterable[_Union[EvaluationSample, _Mapping]]] = ..., failure: _Optional[str] = ...) -> None: ...

class ReportEvaluationResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class BeginPublishRequest(_message.Message):
    __slots__ = ("name", "incarnation", "version", "plan", "store_host", "store_port", "transfer_deadline_ms", "plan_digest", "step")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    STORE_HOST_FIELD_NUMBER: _ClassVar[int]
    STORE_PORT_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    PLAN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    name: str
    incarnation: str
    version: _trajectory_pb2.PolicyVersion
    plan: _rollout_pb2.WeightPlan
    store_host: str
    store_port: int
    transfer_deadline_ms: int
    plan_digest: bytes
    step: int
    def __init__(self, name: _Optional[str] = ..., incarnation: _Optional[str] = ..., version: _Optional[_Union[_trajectory_pb2.PolicyVersion, _Mapping]] = ..., plan: _Optional[_Union[_rollout_pb2.WeightPlan, _Mapping]] = ..., store_host: _Optional[str] = ..., store_port: _Optional[int] = ..., transfer_deadline_ms: _Optional[int] = ..., plan_digest: _Optional[bytes] = ..., step: _Optional[int] = ...) -> None: ...

class BeginPublishResponse(_message.Message):
    __slots__ = ("epoch", "needs_plan")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NEEDS_PLAN_FIELD_NUMBER: _ClassVar[int]
    epoch: _rollout_pb2.WeightEpoch
    needs_plan: bool
    def __init__(self, epoch: _Optional[_Union[_rollout_pb2.WeightEpoch, _Mapping]] = ..., needs_plan: bool = ...) -> None: ...

class FinishPublishRequest(_message.Message):
    __slots__ = ("name", "incarnation", "version", "digest", "failure")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    name: str
    incarnation: str
    version: _trajectory_pb2.PolicyVersion
    digest: bytes
    failure: str
    def __init__(self, name: _Optional[str] = ..., incarnation: _Optional[str] = ..., version: _Optional[_Union[_trajectory_pb2.PolicyVersion, _Mapping]] = ..., digest: _Optional[bytes] = ..., failure: _Optional[str] = ...) -> None: ...

class FinishPublishResponse(_message.Message):
    __slots__ = ("committed", "abort_reason", "members", "max_pause_s")
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    ABORT_REASON_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    MAX_PAUSE_S_FIELD_NUMBER: _ClassVar[int]
    committed: bool
    abort_reason: str
    members: _containers.RepeatedScalarFieldContainer[str]
    max_pause_s: float
    def __init__(self, committed: bool = ..., abort_reason: _Optional[str] = ..., members: _Optional[_Iterable[str]] = ..., max_pause_s: _Optional[float] = ...) -> None: ...

class ReportStepRequest(_message.Message):
    __slots__ = ("name", "incarnation", "step", "version", "metrics", "is_last")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    IS_LAST_FIELD_NUMBER: _ClassVar[int]
    name: str
    incarnation: str
    step: int
    version: _trajectory_pb2.PolicyVersion
    metrics: _containers.ScalarMap[str, float]
    is_last: bool
    def __init__(self, name: _Optional[str] = ..., incarnation: _Optional[str] = ..., step: _Optional[int] = ..., version: _Optional[_Union[_trajectory_pb2.PolicyVersion, _Mapping]] = ..., metrics: _Optional[_Mapping[str, float]] = ..., is_last: bool = ...) -> None: ...

class ReportStepResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MemberStatus(_message.Message):
    __slots__ = ("name", "role", "address", "version", "is_serving", "heartbeat_age_s", "num_leases")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    IS_SERVING_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_AGE_S_FIELD_NUMBER: _ClassVar[int]
    NUM_LEASES_FIELD_NUMBER: _ClassVar[int]
    name: str
    role: Role
    address: str
    version: _trajectory_pb2.PolicyVersion
    is_serving: bool
    heartbeat_age_s: float
    num_leases: int
    def __init__(self, name: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., address: _Optional[str] = ..., version: _Optional[_Union[_trajectory_pb2.PolicyVersion, _Mapping]] = ..., is_serving: bool = ..., heartbeat_age_s: _Optional[float] = ..., num_leases: _Optional[int] = ...) -> None: ...

class EvaluationResult(_message.Message):
    __slots__ = ("version", "step", "num_prompts", "num_failed", "pass_at_1", "pass_at_1_stderr", "mean_generated_tokens", "truncation_rate", "details")
    class DetailsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPTS_FIELD_NUMBER: _ClassVar[int]
    NUM_FAILED_FIELD_NUMBER: _ClassVar[int]
    PASS_AT_1_FIELD_NUMBER: _ClassVar[int]
    PASS_AT_1_STDERR_FIELD_NUMBER: _ClassVar[int]
    MEAN_GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATION_RATE_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    version: _trajectory_pb2.PolicyVersion
    step: int
    num_prompts: int
    num_failed: int
    pass_at_1: float
    pass_at_1_stderr: float
    mean_generated_tokens: float
    truncation_rate: float
    details: _containers.ScalarMap[str, float]
    def __init__(self, version: _Optional[_Union[_trajectory_pb2.PolicyVersion, _Mapping]] = ..., step: _Optional[int] = ..., num_prompts: _Optional[int] = ..., num_failed: _Optional[int] = ..., pass_at_1: _Optional[float] = ..., pass_at_1_stderr: _Optional[float] = ..., mean_generated_tokens: _Optional[float] = ..., truncation_rate: _Optional[float] = ..., details: _Optional[_Mapping[str, float]] = ...) -> None: ...

class GetMeshStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetMeshStatusResponse(_message.Message):
    __slots__ = ("run_id", "run_state", "failure", "step", "num_steps", "committed_version", "metrics", "last_evaluation", "num_groups", "num_slots", "num_slots_used", "generated_tokens_per_s", "num_generated_tokens", "members", "waiting_for")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class NumGroupsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_STATE_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_VERSION_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    LAST_EVALUATION_FIELD_NUMBER: _ClassVar[int]
    NUM_GROUPS_FIELD_NUMBER: _ClassVar[int]
    NUM_SLOTS_FIELD_NUMBER: _ClassVar[int]
    NUM_SLOTS_USED_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    NUM_GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    run_state: RunState
    failure: str
    step: int
    num_steps: int
    committed_version: _trajectory_pb2.PolicyVersion
    metrics: _containers.ScalarMap[str, float]
    last_evaluation: EvaluationResult
    num_groups: _containers.ScalarMap[str, int]
    num_slots: int
    num_slots_used: int
    generated_tokens_per_s: float
    num_generated_tokens: int
    members: _containers.RepeatedCompositeFieldContainer[MemberStatus]
    waiting_for: str
    def __init__(self, run_id: _Optional[str] = ..., run_state: _Optional[_Union[RunState, str]] = ..., failure: _Optional[str] = ..., step: _Optional[int] = ..., num_steps: _Optional[int] = ..., committed_version: _Optional[_Union[_trajectory_pb2.PolicyVersion, _Mapping]] = ..., metrics: _Optional[_Mapping[str, float]] = ..., last_evaluation: _Optional[_Union[EvaluationResult, _Mapping]] = ..., num_groups: _Optional[_Mapping[str, int]] = ..., num_slots: _Optional[int] = ..., num_slots_used: _Optional[int] = ..., generated_tokens_per_s: _Optional[float] = ..., num_generated_tokens: _Optional[int] = ..., members: _Optional[_Iterable[_Union[MemberStatus, _Mapping]]] = ..., waiting_for: _Optional[str] = ...) -> None: ...
