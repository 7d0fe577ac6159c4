"""Readers and writers refuse values that the wire cannot or must not carry. All other values stay the same."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollmesh.errors import InvalidArgumentError
from rollmesh.types import Int32Array, PolicyFault, PolicyVersion, Score, TensorSpec, WeightEpoch, WeightPlan
from rollmesh.v1 import coordinator_pb2, reference_pb2, reward_pb2, rollout_pb2
from rollmesh.wire import checks, control, evaluation, limits, logprobs, outcome, weights

NOT_FINITE = (math.nan, math.inf, -math.inf)


@given(st.floats(0, 1e9))
def test_times_cross_the_wire_to_the_millisecond(seconds: float) -> None:
    back = checks.milliseconds(seconds, "ttl_ms") / 1000
    if seconds * 1000 < 2**32 - 1:
        assert abs(back - seconds) <= 0.001
    assert (back == 0) == (seconds == 0)


def test_a_time_too_long_for_the_wire_is_the_longest_it_has() -> None:
    assert checks.milliseconds(math.inf, "ttl_ms") == 2**32 - 1


@pytest.mark.parametrize("seconds", [-0.1, math.nan])
def test_what_is_not_a_time_is_refused(seconds: float) -> None:
    with pytest.raises(InvalidArgumentError, match="ttl_ms"):
        checks.milliseconds(seconds, "ttl_ms")


@given(st.integers(1, 999_999), st.integers(0, 6))
def test_settings_of_six_digits_are_the_same_number_on_both_sides(digits: int, exponent: int) -> None:
    value = float(f"{digits}e-{exponent}")
    assert checks.shortest(float(np.float32(value))) == value


@pytest.mark.parametrize("value", [*NOT_FINITE, 1e39])
def test_a_reward_that_the_wire_cannot_hold_is_not_sent(value: float) -> None:
    for answer in (Score(value, 0.0), Score(0.0, value), PolicyFault("loops", value)):
        with pytest.raises(InvalidArgumentError):
            outcome.outcome_to_proto("1", answer)


@pytest.mark.parametrize("value", NOT_FINITE)
def test_a_reward_that_is_not_finite_is_not_accepted(value: float) -> None:
    spoiled = {
        "score.reward": reward_pb2.Score(reward=value),
        "score.score": reward_pb2.Score(score=value),
        "score.extra_logs[accuracy]": reward_pb2.Score(extra_logs={"accuracy": value}),
    }
    for field, score in spoiled.items():
        with pytest.raises(InvalidArgumentError) as caught:
            outcome.outcome_from_proto(reward_pb2.ScoreResponse(request_id="1", score=score))
        assert caught.value.field == field
    with pytest.raises(InvalidArgumentError, match=r"policy_fault\.penalty"):
        outcome.outcome_from_proto(reward_pb2.ScoreResponse(policy_fault=reward_pb2.PolicyFault(penalty=value)))


def test_an_answer_without_an_outcome_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="outcome"):
        outcome.outcome_from_proto(reward_pb2.ScoreResponse(request_id="1"))
    with pytest.raises(InvalidArgumentError, match="outcome"):
        logprobs.logprobs_from_proto(reference_pb2.ComputeLogProbsResponse(request_id="1"), 3)


def test_a_flood_of_extra_logs_is_refused() -> None:
    logs = {f"log{i}": 0.0 for i in range(limits.MAX_NAMED_NUMBERS + 1)}
    with pytest.raises(InvalidArgumentError, match="extra_logs"):
        outcome.outcome_from_proto(reward_pb2.ScoreResponse(score=reward_pb2.Score(extra_logs=logs)))


def test_a_reward_server_that_states_no_bound_gets_the_documented_one() -> None:
    assert outcome.reward_info_from_proto(reward_pb2.GetRewardInfoResponse(name="f")).max_in_flight == 256


def test_log_probs_for_another_number_of_tokens_are_refused() -> None:
    message = logprobs.logprobs_to_proto("1", np.zeros(3, np.float32))
    assert len(np.asarray(logprobs.logprobs_from_proto(message, 3))) == 3
    with pytest.raises(InvalidArgumentError, match="logprobs"):
        logprobs.logprobs_from_proto(message, 4)


def _tokens(count: int) -> Int32Array:
    return np.arange(count, dtype=np.int32)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (logprobs.LogProbsCall("1", _tokens(3), 0, 1.0), "num_prompt_tokens"),
        (logprobs.LogProbsCall("1", _tokens(3), 3, 1.0), "num_prompt_tokens"),
        (logprobs.LogProbsCall("1", _tokens(0), 1, 1.0), "num_prompt_tokens"),
        (logprobs.LogProbsCall("1", _tokens(3), 1, 0.0), "temperature"),
        (logprobs.LogProbsCall("1", _tokens(3), 1, -1.0), "temperature"),
        (logprobs.LogProbsCall("", _tokens(3), 1, 1.0), "request_id"),
    ],
)
def test_a_faulty_request_for_log_probs_is_refused(call: logprobs.LogProbsCall, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        logprobs.logprobs_call_from_proto(logprobs.logprobs_call_to_proto(call))
    assert caught.value.field == field


def _plan(**changes: Any) -> WeightPlan:
    tensors = tuple(TensorSpec(f"w{i}", "float32", (2, 3)) for i in range(3))
    return dataclasses.replace(WeightPlan(tensors, (0, 2), bytes(32)), **changes)


@pytest.mark.parametrize(
    ("plan", "field"),
    [
        (_plan(tensors=()), "plan.tensors"),
        (_plan(tensors=(TensorSpec("", "float32", ()),)), "plan.tensors[0].name"),
        (_plan(tensors=(TensorSpec("w", "", ()),)), "plan.tensors[0].dtype"),
        (_plan(tensors=(TensorSpec("w", "float32", (1,) * 17),)), "plan.tensors[0].shape"),
        (_plan(bucket_starts=()), "plan.bucket_starts"),
        (_plan(bucket_starts=(1, 2)), "plan.bucket_starts"),
        (_plan(bucket_starts=(0, 2, 2)), "plan.bucket_starts"),
        (_plan(bucket_starts=(0, 2, 1)), "plan.bucket_starts"),
        (_plan(bucket_starts=(0, 3)), "plan.bucket_starts"),
        (_plan(digest=bytes(31)), "plan.digest"),
    ],
)
def test_a_faulty_plan_is_refused(plan: WeightPlan, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        weights.plan_from_proto(weights.plan_to_proto(plan))
    assert caught.value.field == field


def test_a_scalar_tensor_has_an_empty_shape() -> None:
    plan = _plan(tensors=(TensorSpec("scale", "float32", ()),), bucket_starts=(0,))
    assert weights.plan_from_proto(weights.plan_to_proto(plan)) == plan


def test_a_failed_transfer_needs_no_digest_and_a_finished_one_does() -> None:
    failed = weights.FinishPublishCall(control.Caller("learner", "1"), PolicyVersion(0, 3), b"", "link down")
    assert weights.finish_publish_from_proto(weights.finish_publish_to_proto(failed)) == failed
    with pytest.raises(InvalidArgumentError, match="digest"):
        weights.finish_publish_from_proto(weights.finish_publish_to_proto(dataclasses.replace(failed, failure="")))


def test_a_failed_evaluation_has_no_samples_and_a_finished_one_does() -> None:
    failed = evaluation.ReportEvaluationCall(control.Caller("rollout-0", "1"), "eval:0:1", 1, (), "no reward")
    assert evaluation.report_evaluation_from_proto(evaluation.report_evaluation_to_proto(failed)) == failed
    with pytest.raises(InvalidArgumentError, match="samples"):
        evaluation.report_evaluation_from_proto(
            evaluation.report_evaluation_to_proto(dataclasses.replace(failed, failure=""))
        )


_SAMPLING = coordinator_pb2.SamplingSpec(temperature=1.0, top_p=1.0, max_new_tokens=8)


@pytest.mark.parametrize(
    ("field", "spoil"),
    [
        ("sampling.temperature", lambda m: setattr(m, "temperature", -1.0)),
        ("sampling.temperature", lambda m: setattr(m, "temperature", math.nan)),
        ("sampling.top_p", lambda m: setattr(m, "top_p", 0.0)),
        ("sampling.top_p", lambda m: setattr(m, "top_p", math.nan)),
        ("sampling.max_new_tokens", lambda m: setattr(m, "max_new_tokens", 0)),
        ("sampling.max_new_tokens", lambda m: setattr(m, "max_new_tokens", limits.MAX_TOKENS + 1)),
    ],
)
def test_a_faulty_sampling_spec_is_refused(field: str, spoil: Callable[[coordinator_pb2.SamplingSpec], None]) -> None:
    message = coordinator_pb2.SamplingSpec()
    message.CopyFrom(_SAMPLING)
    spoil(message)
    with pytest.raises(InvalidArgumentError) as caught:
        control.sampling_from_proto(message)
    assert caught.value.field == field


def test_steps_count_from_one_unless_the_run_ends_without_any() -> None:
    call = control.ReportStepCall(control.Caller("learner", "1"), 0, PolicyVersion(0, 0), {}, False)
    with pytest.raises(InvalidArgumentError, match="step"):
        control.report_step_from_proto(control.report_step_to_proto(call))
    last = dataclasses.replace(call, is_last=True)
    assert control.report_step_from_proto(control.report_step_to_proto(last)) == last


@pytest.mark.parametrize("value", NOT_FINITE)
def test_a_metric_that_is_not_finite_is_not_sent(value: float) -> None:
    call = control.ReportStepCall(control.Caller("learner", "1"), 1, PolicyVersion(0, 1), {"policy/loss": value}, False)
    with pytest.raises(InvalidArgumentError, match=r"metrics\[policy/loss\]"):
        control.report_step_to_proto(call)


def test_texts_are_measured_in_bytes() -> None:
    assert checks.text("é" * 8, "text", 16) == "é" * 8
    with pytest.raises(InvalidArgumentError, match="16 bytes"):
        checks.text("é" * 9, "text", 16)


def test_a_later_message_of_the_lease_stream_names_nobody() -> None:
    grant = control.CreditGrant(None, 3)
    assert control.grant_from_proto(control.grant_to_proto(grant)) == grant


def _prepare(plan: WeightPlan | None, digest: bytes) -> weights.PrepareWeightsCall:
    epoch = WeightEpoch(3, "10.0.0.1", 29500, 5)
    return weights.PrepareWeightsCall(PolicyVersion(0, 1), plan, epoch, 1, 12.5, digest)


@pytest.mark.parametrize("num_tensors", [1, 7, 3000], ids=lambda n: f"{n} tensors")
def test_a_plan_that_was_encoded_before_reads_as_one_that_is_written_anew(num_tensors: int) -> None:
    tensors = tuple(TensorSpec(f"layers.{i}.weight", "bfloat16", (i, 4)) for i in range(num_tensors))
    plan = _plan(tensors=tensors, bucket_starts=(0,))
    encoded = weights.prepare_to_bytes(_prepare(None, plan.digest), weights.encode_plan(plan))
    message = rollout_pb2.PrepareWeightsRequest.FromString(encoded)
    assert weights.prepare_from_proto(message) == _prepare(plan, plan.digest)


def test_a_plan_may_be_named_by_its_digest_alone() -> None:
    call = _prepare(None, bytes(32))
    assert weights.prepare_from_proto(weights.prepare_to_proto(call)) == call


def test_a_plan_without_a_digest_beside_it_has_its_own() -> None:
    message = weights.prepare_to_proto(_prepare(_plan(), b""))
    assert weights.prepare_from_proto(message).plan_digest == _plan().digest


@pytest.mark.parametrize(("plan", "digest"), [(None, b""), (None, bytes(31)), (_plan(), bytes(31))])
def test_a_digest_that_names_no_plan_is_refused(plan: WeightPlan | None, digest: bytes) -> None:
    with pytest.raises(InvalidArgumentError, match="plan_digest"):
        weights.prepare_from_proto(weights.prepare_to_proto(_prepare(plan, digest)))


def test_an_answer_that_asks_for_the_plan_has_no_epoch() -> None:
    assert weights.begin_publish_answer_from_proto(weights.begin_publish_answer_to_proto(None)) is None
