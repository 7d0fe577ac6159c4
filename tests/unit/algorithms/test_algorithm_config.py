"""The objective's section: presets, what they resolve to, and what is refused."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from rollmesh.algorithms.advantages import ESTIMATORS
from rollmesh.algorithms.config import AlgorithmSection, Estimator
from rollmesh.algorithms.corrections import CORRECTIONS
from rollmesh.algorithms.losses import POLICY_LOSSES
from rollmesh.algorithms.presets import PAPERS, PRESETS
from rollmesh.algorithms.variants import LOSSES, SurrogateLoss
from rollmesh.config import merge
from rollmesh.config.section import validate
from rollmesh.errors import ConfigError


def _section(**given: Any) -> AlgorithmSection:
    return validate(AlgorithmSection, given)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_sets_what_it_says_and_its_dump_reads_back_to_the_same(name: str) -> None:
    section = _section(type=name)
    assert AlgorithmSection(**section.model_dump()) == section
    assert _section(**section.model_dump(mode="json")) == section
    dumped = section.model_dump(mode="json")
    assert merge(dumped, PRESETS[name]) == dumped


def test_every_name_in_the_configuration_has_its_implementation_and_its_paper() -> None:
    assert set(PRESETS) == set(PAPERS) == set(get_args(AlgorithmSection.model_fields["type"].annotation))
    assert set(ESTIMATORS) == set(get_args(Estimator))
    assert set(POLICY_LOSSES) == set(LOSSES) == types_of("loss")
    corrections = types_of("correction")
    assert {name for name, _ in CORRECTIONS} == set(corrections) - {"auto"}


def types_of(part: str) -> set[str]:
    """The types of all variants of one of the parts."""
    variants: Any = get_args(AlgorithmSection.model_fields[part].annotation)
    return {name for variant in variants for name in get_args(variant.model_fields["type"].annotation)}


def test_the_file_goes_over_the_preset_setting_by_setting() -> None:
    section = _section(type="gspo", loss={"clip_high": 1e-3}, kl={"coef": 0.01})
    assert (section.loss.type, section.loss.clip_low, section.loss.clip_high) == ("gspo", 3e-4, 1e-3)
    assert (section.kl.coef, section.kl.estimator) == (0.01, "k3")


def test_a_null_in_the_file_switches_a_presets_setting_off() -> None:
    assert _section(type="dapo", filter={"score_range": None}).filter.score_range is None
    loss = _section(type="ppo", loss={"clip_low": None}).loss
    assert isinstance(loss, SurrogateLoss)
    assert loss.clip_low is None


@pytest.mark.parametrize("correction", ["m2po", "dppo"])
def test_a_correction_that_is_a_trust_region_takes_the_clip_away_unless_the_file_sets_one(correction: str) -> None:
    free = _section(correction={"type": correction})
    clipped = _section(correction={"type": correction}, loss={"clip_high": 0.5})
    assert (free.loss.clip_low, free.loss.clip_high) == (None, None)
    assert (clipped.loss.clip_low, clipped.loss.clip_high) == (None, 0.5)
    assert AlgorithmSection(**free.model_dump()) == free


@pytest.mark.parametrize(
    ("estimator", "should_whiten"),
    [
        ("gae", True),
        ("reinforce", True),
        ("reinforce_baseline", True),
        ("group_norm", False),
        ("dr_grpo", False),
        ("rloo", False),
    ],
)
def test_whitening_follows_the_estimator_unless_it_is_set(estimator: str, should_whiten: bool) -> None:
    auto = _section(advantage={"estimator": estimator}).advantage
    centred = _section(advantage={"estimator": estimator, "whitening": "center"}).advantage
    off = _section(advantage={"estimator": estimator, "whitening": "none"}).advantage
    assert (auto.should_whiten, auto.should_scale) == (should_whiten, should_whiten)
    assert (centred.should_whiten, centred.should_scale) == (True, False)
    assert (off.should_whiten, off.should_scale) == (False, False)


def test_only_gae_needs_a_critic_and_only_comparing_estimators_need_groups() -> None:
    needs = {name: (_section(type=name).needs_critic, _section(type=name).needs_groups) for name in PRESETS}
    assert {name for name, (critic, _) in needs.items() if critic} == {"ppo"}
    assert {name for name, (_, groups) in needs.items() if not groups} == {"ppo", "reinforce++"}


@pytest.mark.parametrize(
    ("given", "place", "problem"),
    [
        ({"reward": {"clip": [1, 1]}}, "algorithm.reward.clip", "1 is not below 1"),
        ({"filter": {"score_range": [1, 0]}}, "algorithm.filter.score_range", "1 is not below 0"),
        ({"correction": {"low": 5}}, "algorithm.correction.low", "5 is not below 5"),
        ({"loss": {"clip_low": 1.0}}, "algorithm.loss.clip_low", "1 allows ratios below 0"),
        (
            {"advantage": {"gae_lambda": 0.9}},
            "algorithm.advantage.gae_lambda",
            "0.9 belongs to gae and",
        ),
        (
            {"type": "rloo", "advantage": {"gamma": 0.9}},
            "algorithm.advantage.gamma",
            "0.9 belongs to gae, re",
        ),
        (
            {"type": "ppo", "advantage": {"mixed_version": "weight"}},
            "algorithm.advantage.mixed_version",
            "weight belongs",
        ),
        (
            {"loss": {"constant_tokens": 100}},
            "algorithm.loss.constant_tokens",
            "has no effect with aggregation token_mean",
        ),
        (
            {"type": "gspo", "correction": {"type": "tis"}},
            "algorithm.correction.type",
            "tis weighs single tokens",
        ),
        (
            {"loss": {"type": "policy_gradient"}, "correction": {"type": "dppo"}},
            "algorithm.correction.type",
            "dppo limits a ratio",
        ),
        (
            {"loss": {"type": "policy_gradient"}, "correction": {"ratio": "behaviour"}},
            "algorithm.correction.ratio",
            "behaviour corrects nothing",
        ),
        ({"type": "gspo", "correction": {"type": "m2po"}}, "algorithm.correction.type", "m2po weighs single tokens"),
        ({"type": "gspo", "loss": {"clip_low": 1.0}}, "algorithm.loss.clip_low", "1 allows ratios below 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_with_place_and_problem(
    given: dict[str, Any], place: str, problem: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        _section(**given)
    assert refused.value.place == place
    assert refused.value.problem.startswith(problem)
    assert refused.value.fix


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"correction": {"type": "tis", "m2_limit": 1}},
            "correction.m2_limit: belongs to m2po and not to tis; remove",
        ),
        (
            {"correction": {"m2_limit": 1}},
            "correction.m2_limit: belongs to m2po and not to auto; remove it, or",
        ),
        ({"correction": {"type": "tis", "ratio": "old"}}, "correction.ratio: belongs to auto, none and not to tis"),
        (
            {"correction": {"type": "decoupled", "low": 1}},
            "correction.low: belongs to auto, tis, icepop, seq_mask",
        ),
        (
            {"correction": {"type": "dppo", "lo": 1}},
            "correction.lo: is not a known key; known keys are div",
        ),
        (
            {"correction": {"type": "tiss"}},
            "correction.type: 'tiss' is not accepted; it should be one of",
        ),
        ({"correction": {"type": "dppo", "divergence": "js"}}, "correction.divergence: 'js' is not accepted"),
        ({"correction": 3}, "correction: 3 is not a section"),
        (
            {"loss": {"type": "policy_gradient", "clip_low": 1}},
            "loss.clip_low: belongs to ppo, gspo, cispo",
        ),
        (
            {"loss": {"type": "cispo", "dual_clip": 3}},
            "loss.dual_clip: belongs to ppo, gspo and not to cispo",
        ),
    ],
)
def test_a_setting_of_another_variant_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        _section(**given)
    assert str(refused.value).startswith(message)


CORRECTIONS_OF = {
    "ppo": ["auto", "none", "tis", "icepop", "seq_mask_tis", "decoupled", "m2po", "dppo"],
    "gspo": ["auto", "none"],
    "cispo": ["auto", "none", "tis", "icepop", "seq_mask_tis", "decoupled", "m2po", "dppo"],
    "policy_gradient": ["auto", "none", "tis", "icepop", "seq_mask_tis"],
}


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize(("loss", "correction"), [(loss, c) for loss in LOSSES for c in CORRECTIONS_OF[loss]])
def test_every_choice_of_variants_over_a_preset_has_their_settings_alone(name: str, loss: str, correction: str) -> None:
    section = _section(type=name, loss={"type": loss}, correction={"type": correction})
    assert (section.loss.type, section.correction.type) == (loss, correction)
    assert _section(**section.model_dump(mode="json")) == section
    clips = {key: value for key, value in section.loss.model_dump().items() if "clip" in key}
    if correction in ("m2po", "dppo"):
        assert set(clips.values()) == {None}
    assert set(clips) == set(LOSSES[loss].model_fields) & {"clip_low", "clip_high", "dual_clip"}


def test_a_presets_estimator_takes_its_settings_with_it() -> None:
    assert _section(type="ppo", advantage={"estimator": "reinforce"}).advantage.gae_lambda == 1.0
    assert _section(type="ppo", advantage={"estimator": "gae"}).advantage.gae_lambda == 0.95


def test_a_presets_clip_carries_over_to_a_loss_of_the_same_settings_alone() -> None:
    section = _section(type="reinforce++", loss={"type": "cispo"})
    assert (section.loss.model_dump()["clip_low"], section.loss.model_dump()["clip_high"]) == (None, 4.0)
    section = _section(type="dr_grpo", loss={"type": "policy_gradient"})
    assert section.loss.aggregation == "constant"


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ({"type": "grpoo"}, "type"),
        ({"type": ["grpo"]}, "type"),
        ({"loss": {"clip_low": 0}}, "loss.clip_low"),
        ({"loss": {"dual_clip": 1}}, "loss.dual_clip"),
        ({"loss": None}, "loss"),
        ({"advantage": {"gamma": 1.1}}, "advantage.gamma"),
        ({"advantage": {"gae_lambda": -0.1}}, "advantage.gae_lambda"),
        ({"advantage": {"estimator": "grpo"}}, "advantage.estimator"),
        ({"reward": {"stop_properly_coef": 1.1}}, "reward.stop_properly_coef"),
        ({"correction": {"high": 0}}, "correction.high"),
        ({"kl": {"target": 0}}, "kl.target"),
        ({"kl": {"horizon": 0}}, "kl.horizon"),
        ({"policy_frozen_steps": -1}, "policy_frozen_steps"),
    ],
)
def test_a_value_out_of_its_range_is_refused_with_its_place(given: dict[str, Any], place: str) -> None:
    with pytest.raises(ConfigError) as refused:
        _section(**given)
    assert refused.value.place == place


def test_an_unknown_key_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'clip_high'"):
        _section(loss={"clip_hihg": 0.3})
