"""The nouns of the mesh, as frozen dataclasses that the rest of the code takes and returns.

Arrays are one-dimensional numpy arrays. A sample has ``P`` prompt tokens and ``R`` response tokens. The response tokens
are generated tokens and environment tokens in order; ``G`` of them are generated. Between processes the dataclasses
travel as the protobuf messages of the same names (`rollmesh.wire`). Redis stores them as msgpack payloads
(`rollmesh.replay`).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, order=True)
class PolicyVersion:
    """One version of the policy. Versions are ordered by their lineages, then by their numbers."""

    lineage: int
    number: int

    def __str__(self) -> str:
        return f"{self.lineage}.{self.number}"

    @classmethod
    def parse(cls, text: str) -> PolicyVersion:
        """Return the version whose ``str`` is ``text``, e.g. "1.8". Raise ValueError for any other text."""
        lineage, number = text.split(".")
        return cls(int(lineage), int(number))

    def next(self) -> PolicyVersion:
        """Return the next version of the same lineage."""
        return PolicyVersion(self.lineage, self.number + 1)


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """A stretch of generated tokens that one version made.

    Attributes:
        version: the version that made the tokens.
        start: the index of the first token; only generated tokens are counted, from 0.
        length: the number of tokens.
    """

    version: PolicyVersion
    start: int
    length: int


@dataclass(frozen=True, slots=True, order=True)
class PromptId:
    """One row of one pass over one dataset."""

    dataset: str
    epoch: int
    index: int

    def __str__(self) -> str:
        return f"{self.dataset}:{self.epoch}:{self.index}"


class StopReason(enum.Enum):
    """Why a turn ended."""

    STOP = "stop"
    LENGTH = "length"
    ENVIRONMENT = "environment"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True)
class Turn:
    """One stretch of generated tokens, and the environment tokens that follow."""

    num_generated_tokens: int
    num_environment_tokens: int
    stop_reason: StopReason


@dataclass(frozen=True, slots=True)
class Score:
    """A scorer's answer: the numbers of one sample.

    Attributes:
        reward: the number to train on.
        score: the number by which groups are filtered, and evaluations are measured.
        extra_logs: further numbers for the metrics, by name.
    """

    reward: float
    score: float
    extra_logs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RetryableFailure:
    """A scorer's answer: the sample cannot be scored now, and may be sent again after ``retry_after_s``.

    A failure never becomes a reward.
    """

    reason: str
    retry_after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class InvalidSample:
    """A scorer's answer: the sample cannot be scored, and leaves its group and the group's baseline."""

    reason: str


@dataclass(frozen=True, slots=True)
class PolicyFault:
    """A scorer's answer: a penalty for an action of the policy."""

    reason: str
    penalty: float


ScoreOutcome = Score | RetryableFailure | InvalidSample | PolicyFault


@dataclass(frozen=True)
class Sample:
    """One trajectory.

    Attributes:
        sample_id: the sample's id, unique in the run.
        index: the sample's place in its group, from 0.
        prompt_id: the prompt of the sample.
        prompt_token_ids: int32 [P].
        response_token_ids: int32 [R].
        turns: the turns, in order; together they cover the response without gaps.
        behaviour_logprobs: float32 [G]. The log-probabilities with which the engine sampled, after temperature and
            truncation.
        version_spans: the spans, in order; together they cover the G generated tokens without gaps.
        score: the scorer's answer; None until the sample is scored. A `PolicyFault` becomes a score of its penalty.
        reference_logprobs: float32 [R]; None where no reference was asked.
    """

    sample_id: str
    index: int
    prompt_id: PromptId
    prompt_token_ids: Int32Array
    response_token_ids: Int32Array
    turns: tuple[Turn, ...]
    behaviour_logprobs: Float32Array
    version_spans: tuple[VersionSpan, ...]
    score: Score | None = None
    reference_logprobs: Float32Array | None = None

    @cached_property
    def action_mask(self) -> BoolArray:
        """Return bool [R]: True at the tokens that the policy generated."""
        lengths = [n for turn in self.turns for n in (turn.num_generated_tokens, turn.num_environment_tokens)]
        return np.repeat(np.arange(len(lengths)) % 2 == 0, lengths)

    @property
    def num_generated_tokens(self) -> int:
        return sum(turn.num_generated_tokens for turn in self.turns)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.response_token_ids)

    @property
    def stop_reason(self) -> StopReason:
        return self.turns[-1].stop_reason

    @property
    def oldest_version(self) -> PolicyVersion:
        return min(span.version for span in self.version_spans)

    @property
    def newest_version(self) -> PolicyVersion:
        return max(span.version for span in self.version_spans)


class LeaseKind(enum.Enum):
    """Whether a lease is for training or evaluation."""

    TRAIN = "train"
    EVALUATE = "evaluate"


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """The sampling settings of one lease.

    ``temperature`` 0 samples greedily. ``top_p`` 1 and ``top_k`` 0 are off. ``seed`` 0 leaves the seed to the engine.
    """

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Lease:
    """The right of one worker to produce one group.

    Attributes:
        sequence: the group's place in the line of prompts.
        prompt_json: the prompt cell of the dataset's row, as JSON text.
        label_json: the label cell of that row, as JSON text; empty where the dataset has no labels.
        ttl_s: the time until the lease ends, counted from its receipt, and anew from each renewal.
    """

    group_id: str
    fencing_token: int
    kind: LeaseKind
    prompt_id: PromptId
    sequence: int
    attempt: int
    num_samples: int
    prompt_json: str
    label_json: str
    datasource: str
    sampling: SamplingSpec
    ttl_s: float

    @property
    def key(self) -> LeaseKey:
        return LeaseKey(self.kind, self.group_id, self.fencing_token)


@dataclass(frozen=True, slots=True)
class LeaseKey:
    """The name of one lease."""

    kind: LeaseKind
    group_id: str
    fencing_token: int


@dataclass(frozen=True)
class Group:
    """The samples of one prompt; the unit of leasing, replay and accounting.

    ``samples`` are in the order of their indices; an invalid sample is missing. ``datasource`` is the name by which the
    prompt's metrics are grouped; empty for none.
    """

    group_id: str
    prompt_id: PromptId
    sequence: int
    attempt: int
    samples: tuple[Sample, ...]
    datasource: str = ""

    @property
    def num_tokens(self) -> int:
        return sum(sample.num_tokens for sample in self.samples)

    @property
    def oldest_version(self) -> PolicyVersion:
        return min(sample.oldest_version for sample in self.samples)


class GroupState(enum.Enum):
    """The place of a group in the ledger.

    A group that is trained goes through ``PENDING → LEASED → READY → BATCHED → TRAINED → RETIRED``. Another group ends
    ``FILTERED`` or ``FAILED``.
    """

    PENDING = "pending"
    LEASED = "leased"
    READY = "ready"
    BATCHED = "batched"
    TRAINED = "trained"
    RETIRED = "retired"
    FILTERED = "filtered"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The name, the dtype and the shape of one parameter, as in the Hugging Face checkpoint.

    ``dtype`` is torch's name without its prefix, e.g. "bfloat16".
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """The order in which a transfer sends the tensors, and the buckets.

    Bucket i holds the tensors ``[bucket_starts[i], bucket_starts[i+1])``, one behind the other, each in C order. A
    tensor is never split. `rollmesh.weights.plan` computes ``digest``.
    """

    tensors: tuple[TensorSpec, ...]
    bucket_starts: tuple[int, ...]
    digest: bytes


@dataclass(frozen=True, slots=True)
class Announcement:
    """A version that the learner will send.

    Attributes:
        step: the step that made the version; 0 for the model as it was given.
        plan: the tensors in the order in which they are sent.
        store_host: the host at which the learner's rendezvous store listens.
        store_port: the port of that store.
        transfer_deadline_s: the time that the whole transfer may take.
    """

    version: PolicyVersion
    step: int
    plan: WeightPlan
    store_host: str
    store_port: int
    transfer_deadline_s: float


@dataclass(frozen=True, slots=True)
class WeightEpoch:
    """One membership of the broadcast group. The learner is rank 0, and the rendezvous store runs in its process."""

    number: int
    store_host: str
    store_port: int
    world_size: int


class Role(enum.Enum):
    """The kind of a service."""

    ROLLOUT = "rollout"
    REWARD = "reward"
    REFERENCE = "reference"
    LEARNER = "learner"


class RunState(enum.Enum):
    """The state of a run."""

    STARTING = "starting"
    RUNNING = "running"
    FINISHING = "finishing"
    FINISHED = "finished"
    FAILED = "failed"

    @property
    def is_over(self) -> bool:
        return self in (RunState.FINISHED, RunState.FAILED)


@dataclass(frozen=True, slots=True)
class Registration:
    """The coordinator's answer to a new member.

    Attributes:
        committed_version: the version that the engines serve; None before the first.
        newest_version: the newest version that an engine may have served in the whole run; None before the first. Only
            the learner is told this version; the other members get None.
    """

    heartbeat_interval_s: float
    member_timeout_s: float
    committed_version: PolicyVersion | None
    groups_per_batch: int
    num_steps: int
    newest_version: PolicyVersion | None = None


@dataclass(frozen=True, slots=True)
class MemberReport:
    """A member's account of its work, in each heartbeat.

    Attributes:
        num_generated_tokens: the tokens that a rollout worker has generated since its start, with those of unfinished
            samples.
        num_moves: a number that grows when the member's work moves. It is only compared with its last value.
        patience_s: the time for which ``num_moves`` may stay the same without a fault; 0 stands for the run's stall
            timeout.
        phase: the phase of the learner; None for any other member.
        renewals: the leases on which a rollout worker goes on working.
    """

    num_generated_tokens: int = 0
    num_moves: int = 0
    patience_s: float = 0.0
    phase: LearnerPhase | None = None
    renewals: tuple[LeaseKey, ...] = ()


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The coordinator's answer to a heartbeat.

    Attributes:
        committed_version: the version that the engines serve; None until the first commit.
        failure: the reason for which the run failed; empty while it has not failed.
        ended: the leases of the member that are over.
        interval_s: the time until the next heartbeat; 0 stands for the interval of the registration.
        should_publish: whether the learner shall publish its version again, because a rollout worker that joined lacks
            the version. False for any other member.
    """

    run_state: RunState
    committed_version: PolicyVersion | None
    failure: str = ""
    ended: tuple[LeaseKey, ...] = ()
    interval_s: float = 0.0
    should_publish: bool = False


@dataclass(frozen=True, slots=True)
class EvaluationSample:
    """The recorded part of one evaluation sample. ``extra_logs`` holds the reward server's further numbers, by name."""

    reward: float
    score: float
    num_generated_tokens: int
    stop_reason: StopReason
    oldest_version: PolicyVersion
    newest_version: PolicyVersion
    extra_logs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """The result of one evaluation round.

    ``pass_at_1`` is the mean score, and ``pass_at_1_stderr`` its standard error over prompts. ``details`` holds the
    metrics whose names come from the data; see `rollmesh.telemetry.details`.
    """

    version: PolicyVersion
    step: int
    num_prompts: int
    num_failed: int
    pass_at_1: float
    pass_at_1_stderr: float
    mean_generated_tokens: float
    truncation_rate: float
    details: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ReceiveReport:
    """An engine's answer to a transfer. ``digests`` holds the digest of each process of the engine."""

    digests: tuple[bytes, ...]
    num_bytes: int
    transfer_s: float


@dataclass(frozen=True, slots=True)
class CommitReport:
    """An engine's answer to a commit. The engine stood still for ``pause_s``, and loaded for ``load_s`` of them."""

    pause_s: float
    load_s: float


@dataclass(frozen=True, slots=True)
class PublishOutcome:
    """How the publish of a version ended."""

    is_committed: bool
    abort_reason: str
    members: tuple[str, ...]
    max_pause_s: float


@dataclass(frozen=True, slots=True)
class MemberStatus:
    """One member in the status of the mesh."""

    name: str
    role: Role
    address: str
    version: PolicyVersion | None
    is_serving: bool
    heartbeat_age_s: float
    num_leases: int


@dataclass(frozen=True)
class MeshStatus:
    """The state of the mesh. ``num_groups`` counts groups by `GroupState` value; ``metrics`` are of the last step."""

    run_id: str
    run_state: RunState
    failure: str
    step: int
    num_steps: int
    committed_version: PolicyVersion | None
    metrics: Mapping[str, float]
    last_evaluation: EvaluationResult | None
    num_groups: Mapping[str, int]
    num_slots: int
    num_slots_used: int
    generated_tokens_per_s: float
    num_generated_tokens: int
    members: tuple[MemberStatus, ...]
    waiting_for: str


@dataclass(frozen=True, slots=True)
class RolloutStatus:
    """A rollout worker's state. ``version`` is None until the first commit."""

    version: PolicyVersion | None
    num_groups_open: int
    num_samples_generating: int
    num_samples_scoring: int
    num_generated_tokens: int
    num_groups_committed: int


class LearnerPhase(enum.Enum):
    """The kind of work that the learner does now."""

    STARTING = "starting"
    WAITING_FOR_BATCH = "waiting_for_batch"
    TRAINING = "training"
    PUBLISHING = "publishing"
    CHECKPOINTING = "checkpointing"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class LearnerStatus:
    """The learner's state: it has trained ``num_steps`` batches, and has been in ``phase`` for ``phase_s`` seconds."""

    phase: LearnerPhase
    num_steps: int
    version: PolicyVersion | None
    phase_s: float


@dataclass(frozen=True, slots=True)
class RewardInfo:
    """A reward server's name and limits. On one stream ``max_in_flight`` samples may wait for their answers."""

    name: str
    max_in_flight: int
