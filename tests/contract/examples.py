"""One example of every noun and call that crosses the wire, each field with a value of its own and none a default.

`CODECS` pairs each example with its two functions and with the protobuf message it becomes.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rollmesh import types
from rollmesh.wire import control, enums, evaluation, logprobs, outcome, status, trajectory, weights

CALLER = control.Caller("rollout-0", "f00d")
OLD = types.PolicyVersion(1, 41)
NEW = types.PolicyVersion(2, 42)
PROMPT_ID = types.PromptId("train", 3, 17)

SAMPLE = types.Sample(
    sample_id="train:3:17/5/1",
    index=5,
    prompt_id=PROMPT_ID,
    prompt_token_ids=np.array([11, 12, 13], np.int32),
    response_token_ids=np.array([21, 22, 23, 24, 25, 26, 27], np.int32),
    turns=(types.Turn(3, 2, types.StopReason.ENVIRONMENT), types.Turn(1, 1, types.StopReason.LENGTH)),
    behaviour_logprobs=np.array([-0.5, -0.25, -1.5, -2.0], np.float32),
    version_spans=(types.VersionSpan(OLD, 0, 1), types.VersionSpan(NEW, 1, 3)),
)

SCORE = types.Score(reward=0.75, score=0.5, extra_logs={"accuracy": 1.0, "format": -0.125})

PLAN = types.WeightPlan(
    tensors=(
        types.TensorSpec("model.embed", "bfloat16", (64, 32)),
        types.TensorSpec("model.norm", "float32", (48,)),
    ),
    bucket_starts=(0, 1),
    digest=bytes(range(32)),
)
EPOCH = types.WeightEpoch(number=6, store_host="10.0.0.1", store_port=29500, world_size=4)

LEASE = types.Lease(
    group_id="train:3:17",
    fencing_token=91,
    kind=types.LeaseKind.EVALUATE,
    prompt_id=PROMPT_ID,
    sequence=101,
    attempt=2,
    num_samples=8,
    prompt_json='"1+1"',
    label_json='"2"',
    datasource="sums",
    sampling=types.SamplingSpec(temperature=0.7, top_p=0.95, top_k=50, max_new_tokens=24, seed=1234),
    ttl_s=300.25,
)

REPORT = types.MemberReport(
    num_generated_tokens=777,
    num_moves=888,
    patience_s=1800.5,
    phase=types.LearnerPhase.CHECKPOINTING,
    renewals=(LEASE.key,),
)

EVALUATION_SAMPLE = types.EvaluationSample(
    reward=0.5,
    score=0.25,
    num_generated_tokens=19,
    stop_reason=types.StopReason.STOP,
    oldest_version=OLD,
    newest_version=NEW,
    extra_logs={"tries": 2.5},
)

EVALUATION_RESULT = types.EvaluationResult(
    version=NEW,
    step=40,
    num_prompts=256,
    num_failed=3,
    pass_at_1=0.61,
    pass_at_1_stderr=0.03,
    mean_generated_tokens=20.5,
    truncation_rate=0.07,
    details={"source/sums/score": 0.25, "source/sums/count": 64.0},
)

MEMBER_STATUS = types.MemberStatus(
    name="rollout-1",
    role=types.Role.ROLLOUT,
    address="127.0.0.1:7001",
    version=OLD,
    is_serving=True,
    heartbeat_age_s=0.4,
    num_leases=9,
)

MESH_STATUS = types.MeshStatus(
    run_id="sums",
    run_state=types.RunState.FAILED,
    failure="reward: gone",
    step=41,
    num_steps=60,
    committed_version=OLD,
    metrics={"reward/mean": 0.4},
    last_evaluation=EVALUATION_RESULT,
    num_groups={"ready": 12},
    num_slots=64,
    num_slots_used=33,
    generated_tokens_per_s=8000.5,
    num_generated_tokens=123456,
    members=(MEMBER_STATUS,),
    waiting_for="the learner waits for a batch",
)


@dataclass(frozen=True)
class Codec:
    """``to_proto(example)`` is the message, ``from_proto(message)`` the example again."""

    example: Any
    to_proto: Callable[[Any], Any]
    from_proto: Callable[[Any], Any]
    options: tuple[Any, ...] = ()
    """Alternatives of the example for the other cases of a oneof."""

    @property
    def writer(self) -> str:
        """The name of the function that writes the message."""
        function = self.to_proto.func if isinstance(self.to_proto, functools.partial) else self.to_proto
        return function.__name__

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The arguments that the writer takes beside the example."""
        return self.to_proto.keywords if isinstance(self.to_proto, functools.partial) else {}

    @property
    def name(self) -> str:
        return self.writer.removesuffix("_to_proto")


_OUTCOMES = (types.RetryableFailure("busy", 1.5), types.InvalidSample("no answer"), types.PolicyFault("loops", -1.5))
_LOGPROBS_CALL = logprobs.LogProbsCall("r9", np.array([4, 5, 6], np.int32), 2, 0.7)
_FINISH_PUBLISH = weights.FinishPublishCall(CALLER, NEW, bytes(range(32, 64)), "link down")

CODECS = [
    Codec(
        SAMPLE.turns[0],
        trajectory.turn_to_proto,
        trajectory.turn_from_proto,
    ),
    Codec(SAMPLE.version_spans[1], trajectory.version_span_to_proto, trajectory.version_span_from_proto),
    Codec(PROMPT_ID, trajectory.prompt_id_to_proto, trajectory.prompt_id_from_proto),
    Codec(SAMPLE, trajectory.sample_to_proto, trajectory.sample_from_proto),
    Codec(
        outcome.ScoreCall(SAMPLE, "1+1=", "1+1=2</s>", '"2"', "sums"),
        functools.partial(outcome.score_call_to_proto, request_id="r7", deadline_s=29.5),
        outcome.score_call_from_proto,
    ),
    Codec(SCORE, lambda x: outcome.outcome_to_proto("r7", x), outcome.outcome_from_proto, _OUTCOMES),
    Codec(_OUTCOMES[0], outcome.retryable_to_proto, outcome.retryable_from_proto),
    Codec(types.RewardInfo("reward_func.py", 64), outcome.reward_info_to_proto, outcome.reward_info_from_proto),
    Codec(_LOGPROBS_CALL, logprobs.logprobs_call_to_proto, logprobs.logprobs_call_from_proto),
    Codec(
        np.array([-0.5, -3.0], np.float32),
        lambda x: logprobs.logprobs_to_proto("r9", x),
        lambda message: logprobs.logprobs_from_proto(message, 2),
        _OUTCOMES[:2],
    ),
    Codec(PLAN, weights.plan_to_proto, weights.plan_from_proto),
    Codec(EPOCH, weights.epoch_to_proto, weights.epoch_from_proto),
    Codec(
        weights.BeginPublishCall(CALLER, NEW, 7, PLAN, "10.0.0.1", 29500, 12.5, PLAN.digest),
        weights.begin_publish_to_proto,
        weights.begin_publish_from_proto,
    ),
    Codec(EPOCH, weights.begin_publish_answer_to_proto, weights.begin_publish_answer_from_proto, (None,)),
    Codec(_FINISH_PUBLISH, weights.finish_publish_to_proto, weights.finish_publish_from_proto),
    Codec(
        types.PublishOutcome(True, "because", ("rollout-0", "rollout-1"), 0.11),
        weights.publish_outcome_to_proto,
        weights.publish_outcome_from_proto,
    ),
    Codec(
        weights.PrepareWeightsCall(NEW, PLAN, EPOCH, 3, 12.5, PLAN.digest),
        weights.prepare_to_proto,
        weights.prepare_from_proto,
    ),
    Codec(True, weights.prepare_answer_to_proto, weights.prepare_answer_from_proto),
    Codec(weights.AbortWeightsCall(NEW, "digest"), weights.abort_to_proto, weights.abort_from_proto),
    Codec(NEW, weights.receive_to_proto, weights.receive_from_proto),
    Codec(
        types.ReceiveReport((bytes(range(32)), bytes(range(1, 33))), 4096, 0.25),
        weights.receive_report_to_proto,
        weights.receive_report_from_proto,
    ),
    Codec(NEW, weights.commit_to_proto, weights.commit_from_proto),
    Codec(types.CommitReport(0.11, 0.07), weights.commit_report_to_proto, weights.commit_report_from_proto),
    Codec(
        control.RegisterCall(CALLER, "sums", types.Role.LEARNER, "127.0.0.1:7000", 2, NEW),
        control.register_to_proto,
        control.register_from_proto,
    ),
    Codec(
        types.Registration(1.5, 30.0, NEW, 32, 60, NEW),
        control.registration_to_proto,
        control.registration_from_proto,
    ),
    Codec(
        control.HeartbeatCall(CALLER, REPORT),
        control.heartbeat_call_to_proto,
        control.heartbeat_call_from_proto,
    ),
    Codec(
        types.Heartbeat(types.RunState.FINISHING, NEW, "oops", (LEASE.key,), 2.5, should_publish=True),
        control.heartbeat_to_proto,
        control.heartbeat_from_proto,
    ),
    Codec(
        control.LeaveCall(CALLER, "no memory", is_replaceable=True), control.leave_to_proto, control.leave_from_proto
    ),
    Codec(control.FailRunCall("sums", "rollout-0 was killed"), control.fail_run_to_proto, control.fail_run_from_proto),
    Codec(control.CreditGrant(CALLER, 5), control.grant_to_proto, control.grant_from_proto),
    Codec(LEASE.sampling, control.sampling_to_proto, control.sampling_from_proto),
    Codec(LEASE, control.lease_to_proto, control.lease_from_proto),
    Codec(LEASE.key, control.lease_key_to_proto, control.lease_key_from_proto),
    Codec(
        control.ReportStepCall(CALLER, 7, NEW, {"policy/loss": -0.5}, True),
        control.report_step_to_proto,
        control.report_step_from_proto,
    ),
    Codec(
        evaluation.ReportEvaluationCall(CALLER, "eval:0:3", 92, (EVALUATION_SAMPLE,), "no reward"),
        evaluation.report_evaluation_to_proto,
        evaluation.report_evaluation_from_proto,
    ),
    Codec(EVALUATION_SAMPLE, evaluation.evaluation_sample_to_proto, evaluation.evaluation_sample_from_proto),
    Codec(EVALUATION_RESULT, evaluation.evaluation_result_to_proto, evaluation.evaluation_result_from_proto),
    Codec(MEMBER_STATUS, status.member_status_to_proto, status.member_status_from_proto),
    Codec(MESH_STATUS, status.mesh_status_to_proto, status.mesh_status_from_proto),
    Codec(
        types.RolloutStatus(NEW, 3, 14, 5, 777, 88),
        status.rollout_status_to_proto,
        status.rollout_status_from_proto,
    ),
    Codec(
        types.LearnerStatus(types.LearnerPhase.PUBLISHING, 41, NEW, 2.5),
        status.learner_status_to_proto,
        status.learner_status_from_proto,
    ),
]


def _without(example: Any, field: str, to_proto: Callable[[Any], Any], from_proto: Callable[[Any], Any]) -> Codec:
    return Codec(replace(example, **{field: None}), to_proto, from_proto)


ABSENT = [
    _without(
        types.Registration(1.5, 30.0, NEW, 32, 60, NEW),
        "committed_version",
        control.registration_to_proto,
        control.registration_from_proto,
    ),
    _without(
        types.Heartbeat(types.RunState.RUNNING, NEW),
        "committed_version",
        control.heartbeat_to_proto,
        control.heartbeat_from_proto,
    ),
    _without(MEMBER_STATUS, "version", status.member_status_to_proto, status.member_status_from_proto),
    _without(MESH_STATUS, "committed_version", status.mesh_status_to_proto, status.mesh_status_from_proto),
    _without(MESH_STATUS, "last_evaluation", status.mesh_status_to_proto, status.mesh_status_from_proto),
    _without(
        types.RolloutStatus(NEW, 3, 14, 5, 777, 88),
        "version",
        status.rollout_status_to_proto,
        status.rollout_status_from_proto,
    ),
    _without(
        types.LearnerStatus(types.LearnerPhase.STARTING, 41, NEW, 2.5),
        "version",
        status.learner_status_to_proto,
        status.learner_status_from_proto,
    ),
    _without(control.CreditGrant(CALLER, 5), "caller", control.grant_to_proto, control.grant_from_proto),
]
"""Examples with one of their optional parts left out."""

ENUM_TABLES: dict[str, tuple[type[enum.Enum], enums.EnumTable[Any]]] = {
    "StopReason": (types.StopReason, enums.STOP_REASONS),
    "LeaseKind": (types.LeaseKind, enums.LEASE_KINDS),
    "Role": (types.Role, enums.ROLES),
    "RunState": (types.RunState, enums.RUN_STATES),
    "LearnerPhase": (types.LearnerPhase, enums.LEARNER_PHASES),
}
