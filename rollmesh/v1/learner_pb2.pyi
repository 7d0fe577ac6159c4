from rollmesh.v1 import trajectory_pb2 as _trajectory_pb2
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LearnerPhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LEARNER_PHASE_UNSPECIFIED: _ClassVar[LearnerPhase]
    LEARNER_PHASE_STARTING: _ClassVar[LearnerPhase]
    LEARNER_PHASE_WAITING_FOR_BATCH: _ClassVar[LearnerPhase]
    LEARNER_PHASE_TRAINING: _ClassVar[LearnerPhase]
    LEARNER_PHASE_PUBLISHING: _ClassVar[LearnerPhase]
    LEARNER_PHASE_CHECKPOINTING: _ClassVar[LearnerPhase]
    LEARNER_PHASE_FINISHED: _ClassVar[LearnerPhase]
LEARNER_PHASE_UNSPECIFIED: LearnerPhase
LEARNER_PHASE_STARTING: LearnerPhase
LEARNER_PHASE_WAITING_FOR_BATCH: LearnerPhase
LEARNER_PHASE_TRAINING: LearnerPhase
LEARNER_PHASE_PUBLISHING: LearnerPhase
LEARNER_PHASE_CHECKPOINTING: LearnerPhase
LEARNER_PHASE_FINISHED: LearnerPhase

class GetLearnerStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetLearnerStatusResponse(_message.Message):
    __slots__ = ("phase", "num_steps", "version", "phase_s")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PHASE_S_FIELD_NUMBER: _ClassVar[int]
    phase: LearnerPhase
    num_steps: int
    version: _trajectory_pb2.PolicyVersion
    phase_s: float
    def __init__(self, phase: _Optional[_Union[LearnerPhase, str]] = ..., num_steps: _Optional[int] = ..., version: _Optional[_Union[_trajectory_pb2.PolicyVersion, _Mapping]] = ..., phase_s: _Optional[float] = ...) -> None: ...
