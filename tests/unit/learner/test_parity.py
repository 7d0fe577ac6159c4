"""Learner and engine have to compute the same log-probabilities before the first optimiser step."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rollmesh.errors import ConfigError
from rollmesh.types import PolicyVersion, VersionSpan
from services.config import MeshConfig
from services.learner.experience import Experience, build_experience
from services.learner.parity import EVERY_STEPS, SEQUENCES_PER_RANK, ParityCheck, ParityMeasurement, merge
from services.learner.ranks import Ranks
from tests.fakes.ranks import RanksWithOthers
from tests.unit.learner.samples import group, mesh_config, sample

VERSION = 4


def _check(dtype: str = "float32", **sections: dict[str, Any]) -> ParityCheck:
    sections["learner"] = {"dtype": dtype, "parity": "error", **sections.get("learner", {})}
    sections.setdefault("rollout", {"engine": {"dtype": dtype}})
    config = mesh_config(Path("model"), Path(), **sections)
    return _of(config, Ranks(0, 1, torch.device("cpu")))


def _of(config: MeshConfig, ranks: Ranks) -> ParityCheck:
    engine = config.rollout.engine
    return ParityCheck(
        config.learner,
        ranks,
        engine_dtype=engine.dtype,
        engine_arguments=engine.extra,
        is_whole_distribution=config.sampling.is_whole,
    )


def _experience(num_samples: int = 2, version: int = VERSION) -> Experience:
    samples = [sample(index, behaviour=[-1.0, -2.0, -3.0], version=version) for index in range(num_samples)]
    return build_experience([[group(samples)]], needs_reference=False)


class Learner:
    """A learner that computes the engine's log-probabilities, shifted at the last token, and records the calls."""

    def __init__(self, experience: Experience, shift: float) -> None:
        self.logprobs = experience.behaviour.clone()
        self.logprobs[-1] += shift
        self.asked: list[list[int]] = []

    def __call__(self, indices: Sequence[int]) -> torch.Tensor:
        self.asked.append(list(indices))
        return self.logprobs


def test_equal_policies_pass_and_are_measured_exactly() -> None:
    experience = _experience()
    metrics = _check()(experience, VERSION, 1, Learner(experience, 5e-4))
    assert metrics["parity/max"] == pytest.approx(5e-4, rel=1e-3)
    assert metrics["parity/mean"] == pytest.approx(5e-4 / 6, rel=1e-3)
    assert metrics["parity/tokens"] == 6


def test_a_difference_stops_the_run_with_the_figures_the_token_and_the_setting() -> None:
    experience = _experience()
    with pytest.raises(ConfigError) as caught:
        _check()(experience, VERSION, 1, Learner(experience, -0.5))
    text = str(caught.value)
    assert text.startswith("learner.parity: learner and engine disagree about the same weights")
    for words in ("over 6 tokens", "0.5 at most", "token 2 of sample train:0:0/1/0", "engine -3.0000, learner -3.5000"):
        assert words in text
    for setting in ("learner.attention", "learner.parity_tolerance", "learner.parity to warn"):
        assert setting in text


def test_a_warning_lets_the_run_go_on_and_off_compares_nothing(caplog: pytest.LogCaptureFixture) -> None:
    experience = _experience()
    with caplog.at_level(logging.WARNING):
        assert _check(learner={"parity": "warn"})(experience, VERSION, 1, Learner(experience, 0.5))["parity/max"] == 0.5
    assert "disagree about the same weights" in caplog.text
    learner = Learner(experience, 0.5)
    assert _check(learner={"parity": "off"})(experience, VERSION, 1, learner) == {}
    assert learner.asked == []


def test_in_bfloat16_the_mean_counts_and_not_the_largest() -> None:
    experience = _experience()
    assert _check("bfloat16")(experience, VERSION, 1, Learner(experience, 0.2))["parity/max"] == pytest.approx(0.2)
    with pytest.raises(ConfigError, match=r"the mean difference may be 0\.1"):
        _check("bfloat16")(experience, VERSION, 1, Learner(experience, 0.9))
    with pytest.raises(ConfigError, match=r"the mean difference may be 0\.01"):
        _check("bfloat16", learner={"parity_tolerance": 0.01})(experience, VERSION, 1, Learner(experience, 0.2))


def test_a_distribution_that_is_cut_is_not_compared() -> None:
    experience = _experience()
    learner = Learner(experience, 0.5)
    assert _check(sampling={"top_p": 0.9})(experience, VERSION, 1, learner) == {}
    assert learner.asked == []


def test_only_samples_of_the_learners_version_are_compared_and_the_first_of_them_are_waited_for() -> None:
    spans = (VersionSpan(PolicyVersion(0, VERSION - 1), 0, 1), VersionSpan(PolicyVersion(0, VERSION), 1, 2))
    mixed = replace(sample(0, behaviour=[-1.0, -2.0, -3.0]), version_spans=spans)
    old = sample(1, behaviour=[-1.0, -2.0, -3.0], version=VERSION - 1)
    fresh = sample(2, behaviour=[-1.0, -2.0, -3.0], version=VERSION)
    check = _check()
    none_fresh = build_experience([[group([mixed, old])]], needs_reference=False)
    unused = Learner(none_fresh, 0.5)
    assert check(none_fresh, VERSION, 1, unused) == {}
    assert unused.asked == []
    one_fresh = build_experience([[group([mixed, old, fresh])]], needs_reference=False)
    learner = Learner(one_fresh, 0.5)
    with pytest.raises(ConfigError, match="over 3 tokens"):
        check(one_fresh, VERSION, 2, learner)
    assert learner.asked == [[2]]


def test_later_batches_are_measured_now_and_then_on_a_few_samples_and_never_stop_the_run() -> None:
    experience, check = _experience(num_samples=3 * SEQUENCES_PER_RANK), _check()
    assert check(experience, VERSION, 1, Learner(experience, 0.0))["parity/tokens"] == 9 * SEQUENCES_PER_RANK
    learner = Learner(experience, 0.0)
    learner.logprobs += 0.5
    measured = [step for step in range(2, 2 * EVERY_STEPS + 2) if check(experience, VERSION, step, learner)]
    assert measured == [1 + EVERY_STEPS, 1 + 2 * EVERY_STEPS]
    assert learner.asked == [list(range(SEQUENCES_PER_RANK))] * 2


def test_a_token_that_both_forbid_differs_by_nothing_and_one_that_one_forbids_by_a_lot() -> None:
    samples = [sample(0, behaviour=[-1.0, -math.inf, -3.0], version=VERSION)]
    experience = build_experience([[group(samples)]], needs_reference=False)
    learner = Learner(experience, 0.0)
    assert _check()(experience, VERSION, 1, learner)["parity/max"] == 0.0
    learner.logprobs[1] = -2.0
    with pytest.raises(ConfigError, match=r"1e\+03 at most"):
        _check()(experience, VERSION, 1, learner)


def test_what_several_ranks_found_is_added_up_and_the_worst_token_is_told() -> None:
    parts = [
        b'{"num_tokens": 3, "total": 0.5, "largest": 0.25, "worst": "a"}',
        b'{"num_tokens": 0, "total": 0.0, "largest": 0.0, "worst": ""}',
        b'{"num_tokens": 1, "total": 0.5, "largest": 0.5, "worst": "b"}',
    ]
    assert merge(parts) == ParityMeasurement(4, 1.0, 0.5, "b")
    assert merge(parts).mean == 0.25


def test_a_log_probability_that_is_no_number_stops_the_run() -> None:
    experience = _experience()
    with pytest.raises(ConfigError, match=r"1e\+03 at most"):
        _check()(experience, VERSION, 1, Learner(experience, math.nan))


@pytest.mark.parametrize("setting", ["quantization", "kv_cache_dtype"])
def test_an_engine_that_is_quantised_differs_by_intention_and_only_warns(
    setting: str, caplog: pytest.LogCaptureFixture
) -> None:
    experience = _experience()
    check = _check(rollout={"engine": {"dtype": "float32", "extra": {setting: "fp8"}}})
    with caplog.at_level(logging.WARNING):
        assert check(experience, VERSION, 1, Learner(experience, 0.5))["parity/max"] == 0.5
    assert "disagree about the same weights" in caplog.text


def test_all_ranks_stop_whichever_of_them_has_the_samples_that_differ() -> None:
    elsewhere = b'{"num_tokens": 3, "total": 1.5, "largest": 1.0, "worst": "token of another rank"}'
    config = mesh_config(Path("model"), Path(), learner={"parity": "error"}, rollout={"engine": {"dtype": "float32"}})
    experience = _experience()
    with pytest.raises(ConfigError, match="token of another rank"):
        _of(config, RanksWithOthers([elsewhere]))(experience, VERSION, 1, Learner(experience, 0.0))
