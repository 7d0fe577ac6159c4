"""What can be known to fail before anything is started: model, prompts, addresses, devices, Redis, user code.

Every check raises ConfigError with the place, the value and the fix. All of them together take a few seconds, and as
long as the user's reward function takes for one sample; a chat template adds the import of transformers, in a process
of its own. Nothing here imports torch, transformers, vLLM or DeepSpeed. The cheapest come first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rollmesh.replay.connection import check_server, without_password
from rollmesh.replay.embedded import find_binary
from services.config import MeshConfig, ScorerConfig
from services.launcher.address_check import check_addresses
from services.launcher.deepspeed_check import check_deepspeed
from services.launcher.device_check import check_device, check_devices
from services.launcher.model_check import check_length, check_model, check_reference
from services.launcher.prompt_check import CheckedPrompts, PromptSource, check_prompts
from services.launcher.server_check import check_answers
from services.preflight import check_engine, check_reward_function


@dataclass(frozen=True)
class Finding:
    """Something that was looked at and found right; ``warning`` says what works and is probably not meant."""

    what: str
    where: str
    result: str
    warning: str = ""


def check(config: ScorerConfig) -> Iterator[Finding]:
    """Run all checks; yields what each has found.

    Raises:
        ConfigError: the mesh, or the servers that stand alone, cannot work.
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
    check_devices(config)
    check_addresses(config)
    trusted = config.model.trust_remote_code
    policy = check_model("model.path", config.model.path, trust_remote_code=trusted, is_trained=True)
    check_length(policy, config.model.max_length)
    check_engine(config.rollout.engine, config.model)
    yield Finding("model", str(config.model.path), policy.architecture)
    yield _describe_algorithm(config)
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
    yield _check_replay(config)
    yield _check_reward(config, prompts[0])


def _describe_algorithm(config: MeshConfig) -> Finding:
    section, (correction, anchor) = config.algorithm, config.algorithm.resolve_correction(config.training.max_staleness)
    loss = f"{section.loss.type} loss, {section.loss.aggregation.replace('_', ' ')}"
    ratio = f"ratio against the {'behaviour' if anchor == 'behaviour' else 'old'} policy"
    weights = "" if correction == "none" else f", {correction}"
    return Finding("algorithm", section.type, f"{section.advantage.estimator} · {loss} · {ratio}{weights}")


def _check_replay(config: MeshConfig) -> Finding:
    if config.replay.url is None:
        return Finding("replay", find_binary().name, "starts with the run")
    check_server(config.replay.url, config.replay.timeout_s)
    return Finding("replay", without_password(config.replay.url), "reachable, writable, never evicts")


def _check_reward(config: MeshConfig, prompts: CheckedPrompts) -> Finding:
    section = config.reward
    if section.function is None:
        check_answers("reward.address", section.address)
        return Finding("reward", section.address, "answers")
    result = check_reward_function(config.reward, prompts.first_place, prompts.first_text, prompts.first_label_json)
    return Finding("reward", str(section.function), result)
