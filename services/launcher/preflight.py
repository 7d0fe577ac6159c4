"""The checks before any process starts: model, prompts, addresses, devices, Redis, the user's code.

Every check raises ConfigError with the place, the value and the fix. The cheapest checks come first. All checks
together take a few seconds, and the time of the user's reward function for one sample. A chat template adds the import
of transformers, in a process of its own. This process imports neither torch, transformers, vLLM nor DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rollmesh.algorithms.config import AlgorithmSection
from rollmesh.config import ReplaySection
from rollmesh.replay.connection import check_server, without_password
from rollmesh.replay.embedded import find_binary
from services.config import MeshConfig, ScorerConfig
from services.launcher.address_check import check_addresses
from services.launcher.deepspeed_check import check_deepspeed
from services.launcher.device_check import check_device
from services.launcher.model_check import check_length, check_model, check_reference
from services.launcher.prompt_check import CheckedPrompts, PromptSource, check_prompts
from services.launcher.server_check import check_answers
from services.preflight import RewardSection, check_engine, check_reward_function


@dataclass(frozen=True)
class Finding:
    """The result of one check that passed.

    Attributes:
        what: the name of the checked part, e.g. "model".
        where: the file, the address or the name that was checked.
        result: the facts that the check found.
        warning: a sentence about a setting that works but is probably not meant; empty for none.
    """

    what: str
    where: str
    result: str
    warning: str = ""


def check(config: ScorerConfig) -> Iterator[Finding]:
    """Run all checks, and yield their findings.

    Raises:
        ConfigError: the mesh cannot work, or the servers of a file without a mesh cannot work.
    """
    yield from _check_mesh(config) if isinstance(config, MeshConfig) else _check_scorers(config)


def _check_scorers(config: ScorerConfig) -> Iterator[Finding]:
    if config.reference is not None and config.model is not None:
        check_device("reference.device", config.reference.device)
        own = config.reference.model_path
        place, path = ("model.path", config.model.path) if own is None else ("reference.model_path", own)
        summary = check_model(place, path, trust_remote_code=config.model.trust_remote_code)
        yield Finding("reference", str(path), summary.architecture)
    if config.reward.function is not None:
        result = check_reward_function(config.reward)
        yield Finding("reward", str(config.reward.function), result)


def _check_mesh(config: MeshConfig) -> Iterator[Finding]:
    check_deepspeed(config.learner.deepspeed)
    check_device("learner.device", config.learner.device)
    if config.has_reference and config.reference:
        check_device("reference.device", config.reference.device)
    check_addresses(config)
    trusted = config.model.trust_remote_code
    policy = check_model("model.path", config.model.path, trust_remote_code=trusted, is_trained=True)
    check_length(policy, config.model.max_length)
    check_engine(config.rollout.engine, config.model)
    yield Finding("model", str(config.model.path), policy.architecture)
    yield _describe_algorithm(config.algorithm, config.training.max_staleness)
    if config.has_reference and config.reference and config.reference.model_path:
        path = config.reference.model_path
        frozen = check_model("reference.model_path", path, trust_remote_code=trusted)
        check_reference(policy, frozen)
        yield Finding("reference", str(path), frozen.architecture)
    sources = [PromptSource("data", config.data, config.sampling.max_new_tokens)]
    if config.evaluation:
        new_tokens = config.evaluation.max_new_tokens or config.sampling.max_new_tokens
        sources.append(PromptSource("evaluation.data", config.evaluation.data, new_tokens))
    prompts = check_prompts(sources, config.model, policy.vocab_size)
    for what, source, checked in zip(("data", "evaluation"), sources, prompts, strict=False):
        warning = config.training.shortfall(checked.num_rows) if what == "data" else ""
        yield Finding(what, str(source.data.path), checked.result, warning)
    yield _check_replay(config.replay)
    yield _check_reward(config.reward, prompts[0])


def _describe_algorithm(section: AlgorithmSection, max_staleness: int) -> Finding:
    correction, anchor = section.resolve_correction(max_staleness)
    loss = f"{section.loss.type} loss, {section.loss.aggregation.replace('_', ' ')}"
    ratio = f"ratio against the {'behaviour' if anchor == 'behaviour' else 'old'} policy"
    weights = "" if correction == "none" else f", {correction}"
    return Finding("algorithm", section.type, f"{section.advantage.estimator} · {loss} · {ratio}{weights}")


def _check_replay(section: ReplaySection) -> Finding:
    if section.url is None:
        return Finding("replay", find_binary().name, "starts with the run")
    check_server(section.url, section.timeout_s)
    return Finding("replay", without_password(section.url), "reachable, writable, never evicts")


def _check_reward(section: RewardSection, prompts: CheckedPrompts) -> Finding:
    if section.function is None:
        check_answers("reward.address", section.address)
        return Finding("reward", section.address, "answers")
    result = check_reward_function(section, prompts.first_place, prompts.first_text, prompts.first_label_json)
    return Finding("reward", str(section.function), result)
