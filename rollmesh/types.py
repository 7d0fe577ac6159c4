"""The nouns of the mesh, as frozen dataclasses: what the rest of the code takes and gives.

Arrays are one-dimensional numpy arrays. Lengths: ``P`` prompt tokens, ``R`` response tokens (generated and
environment tokens in order), ``G`` generated tokens. The protobuf messages of the same names are their wire form
(`rollmesh.wire`), the msgpack payloads their stored form (`rollmesh.replay`).
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
    """One version of the policy, ordered by lineage, then number."""

    lineage: int
    number: int

    def __str__(self) -> str:
        return f"{self.lineage}.{self.number}"

    @classmethod
    def parse(cls, text: str) -> PolicyVersion:
        """The inverse of ``str``. Raises ValueError on anything else."""
        lineage, number = text.split(".")
        return cls(int(lineage), int(number))

    def next(self) -> PolicyVersion:
        return PolicyVersion(self.lineage, self.number + 1)


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """``length`` generated tokens from index ``start`` on (counted over generated tokens) came from ``version``."""

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
    STOP = "stop"
    LENGTH = "length"
    ENVIRONMENT = "environment"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True)
class Turn:
    """One stretch of generated tokens and the environment tokens that followed."""

    num_generated_tokens: int
    num_environment_tokens: int
    stop_reason: StopReason


@dataclass(frozen=True, slots=True)
class Score:
    """A scorer's answer. ``reward`` is trained on; ``score`` is what filtering and evaluation look at."""

    reward: float
    score: float
    extra_logs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RetryableFailure:
    """Not now; never becomes a reward."""

    reason: str
    retry_after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class InvalidSample:
    """Cannot be scored: the sample leaves its group and the group's baseline."""

    reason: str


@dataclass(frozen=True, slots=True)
class PolicyFault:
    """An explicit penalty for something the policy did."""

    reason: str
    penalty: float


ScoreOutcome = Score | RetryableFailure | InvalidSample | PolicyFault


@dataclass(frozen=True)
class Sample:
    """One trajectory.

    Attributes:
        sample_id: unique in the run.
        index: position in the group, from 0.
        prompt_token_ids: int32 [P].
        response_token_ids: int32 [R].
        turns: tile the response.
        behaviour_logprobs: float32 [G], what the engine sampled with, after temperature and truncation.
        version_spans: tile the G generated tokens, in order.
        score: the scorer's answer; None until scored. A `PolicyFault` is stored as a score of its penalty.
        reference_logprobs: float32 [R], or None where no reference was asked.
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
        """bool [R]: true where the policy generated the token."""
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
    TRAIN = "train"
    EVALUATE = "evaluate"


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """How to sample: ``temperature`` 0 is greedy, ``top_p`` 1 and ``top_k`` 0 are off, ``seed`` 0 is the engine's."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to produce one group.

    ``prompt`` and ``label`` are the dataset row's cells as JSON text (``label_json`` empty where there is none);
    ``sequence`` is the group's place in the line; ``ttl_s`` runs from receipt, and begins anew at each renewal.
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
    """Names one lease."""

    kind: LeaseKind
    group_id: str
    fencing_token: int


@dataclass(frozen=True)
class Group:
    """The samples of one prompt: the unit of leasing, replay and accounting. ``samples`` are in order of index;
    a sample that was invalid is absent. ``datasource`` is the name that the prompt's metrics are grouped by; empty for
    none."""

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
    """Where a group is in the ledger: ``PENDING → LEASED → READY → BATCHED → TRAINED → RETIRED``, or an end."""

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
    """One parameter as it is in the Hugging Face checkpoint: ``dtype`` is torch's name without the prefix."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """What a transfer sends in which order. Bucket i holds tensors ``[bucket_starts[i], bucket_starts[i+1])``, laid
    end to end in C order; a tensor is never split. ``digest`` is computed by `rollmesh.weights.plan`."""

    tensors: tuple[TensorSpec, ...]
    bucket_starts: tuple[int, ...]
    digest: bytes


@dataclass(frozen=True, slots=True)
class Announcement:
    """A version that the learner is about to send.

    Attributes:
        step: the step that made the version; 0 for the model as it was given.
        plan: the tensors in the order in which they are sent.
        store_host: where the learner's rendezvous store listens.
        store_port: the store's port.
        transfer_deadline_s: time that the transport may take for the whole transfer.
    """

    version: PolicyVersion
    step: int
    plan: WeightPlan
    store_host: str
    store_port: int
    transfer_deadline_s: float


@dataclass(frozen=True, slots=True)
class WeightEpoch:
    """One membership of the broadcast process group; the learner is rank 0 and hosts the store."""

    number: int
    store_host: str
    store_port: int
    world_size: int


class Role(enum.Enum):
    ROLLOUT = "rollout"
    REWARD = "reward"
    REFERENCE = "reference"
    LEARNER = "learner"


class RunState(enum.Enum):
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
        committed_version: serves; None before the first.
        newest_version: the newest version that an engine may have served in the whole run; None before the first, and
            for every member but the learner.
    """

    heartbeat_interval_s: float
    member_timeout_s: float
    committed_version: PolicyVersion | None
    groups_per_batch: int
    num_steps: int
    newest_version: PolicyVersion | None = None


@dataclass(frozen=True, slots=True)
class MemberReport:
    """What a member says of its work at each heartbeat.

    Attributes:
        num_generated_tokens: of a rollout worker since it started, those of unfinished samples included.
        num_moves: grows whenever the member's work moves; only compared with the number before.
        patience_s: how long ``num_moves`` may rightly stay the same; 0 is no longer than the run's stall timeout.
        phase: of the learner; None of any other member.
        renewals: leases that a rollout worker goes on with.
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
        committed_version: None until the first commit.
        ended: leases of the member that are over.
        interval_s: time until the next heartbeat; 0 is the registration's interval.
    """

    run_state: RunState
    committed_version: PolicyVersion | None
    failure: str = ""
    ended: tuple[LeaseKey, ...] = ()
    interval_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EvaluationSample:
    """What is kept of one evaluation sample. ``extra_logs`` are the reward server's further numbers, by name."""

    reward: float
    score: float
    num_generated_tokens: int
    stop_reason: StopReason
    oldest_version: PolicyVersion
    newest_version: PolicyVersion
    extra_logs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """One evaluation round. ``pass_at_1`` is the mean score, with its standard error over prompts. ``details`` are the
    metrics whose names come from the data; see `rollmesh.telemetry.details`."""

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
    """One engine's answer to a transfer: a digest for each of its processes."""

    digests: tuple[bytes, ...]
    num_bytes: int
    transfer_s: float


@dataclass(frozen=True, slots=True)
class CommitReport:
    """One engine's answer to a commit: how long it stood still, and the part spent loading."""

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
    name: str
    role: Role
    address: str
    version: PolicyVersion | None
    is_serving: bool
    heartbeat_age_s: float
    num_leases: int


@dataclass(frozen=True)
class MeshStatus:
    """The mesh at a glance. ``num_groups`` is by `GroupState` value; ``metrics`` are the last step's."""

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
    """What a rollout worker is doing; ``version`` is None until the first commit."""

    version: PolicyVersion | None
    num_groups_open: int
    num_samples_generating: int
    num_samples_scoring: int
    num_generated_tokens: int
    num_groups_committed: int


class LearnerPhase(enum.Enum):
    STARTING = "starting"
    WAITING_FOR_BATCH = "waiting_for_batch"
    TRAINING = "training"
    PUBLISHING = "publishing"
    CHECKPOINTING = "checkpointing"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class LearnerStatus:
    """What the learner is doing: ``num_steps`` optimiser batches trained, ``phase_s`` seconds in this phase."""

    phase: LearnerPhase
    num_steps: int
    version: PolicyVersion | None
    phase_s: float


@dataclass(frozen=True, slots=True)
class RewardInfo:
    """What a reward server is; ``max_in_flight`` samples of one stream may be unanswered."""

    name: str
    max_in_flight: int
