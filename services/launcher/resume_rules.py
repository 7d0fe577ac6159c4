"""The settings that may change when a run is resumed, and the settings that may not.

Every field of `MeshConfig` stands in one of three tables. The fields in `FIXED` keep their values. The fields in
`LIMITED` may change within a limit. The fields in `FREE` may change. Each group of fields has its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rollmesh.config import Section
from rollmesh.errors import ConfigError
from rollmesh.replay.connection import without_password
from services.config import MeshConfig

FIXED: dict[str, tuple[str, ...]] = {
    "it names the run": ("run.name",),
    "it seeds the order of the prompts": ("run.seed",),
    "the checkpoint holds the weights of that model": ("model.path",),
    "it decides which prompts fit, and the ledger knows prompts by their place in the data": (
        "model.max_length",
        "sampling.max_new_tokens",
        "data.overlong_prompts",
    ),
    "the ledger knows prompts by their place in the data": (
        "data.path",
        "data.split",
        "data.input_key",
        "data.label_key",
        "data.apply_chat_template",
        "data.input_template",
        "data.shuffle",
        "data.max_samples",
    ),
    "groups of the old size wait in Redis": ("training.prompts_per_step", "training.samples_per_prompt"),
    "groups that were drawn with the old value wait in Redis, and a batch has one value": (
        "sampling.temperature",
        "sampling.top_p",
        "sampling.top_k",
    ),
    "it decides whether the checkpoint holds a critic": ("algorithm.advantage.estimator",),
    "the checkpoint holds the coefficient": ("algorithm.kl.coef",),
    "groups that wait in Redis carry log-probabilities of the old reference": ("reference.model_path",),
    "the checkpoint holds the weights of that critic": ("learner.critic.model_path",),
    "the checkpoint is laid out for the old value": (
        "learner.num_ranks",
        "learner.zero_stage",
        "learner.dtype",
        "learner.deepspeed",
    ),
    "the checkpoint holds the optimiser with the old value": (
        "learner.optimizer.betas",
        "learner.optimizer.eps",
        "learner.optimizer.weight_decay",
        "learner.critic.optimizer.betas",
        "learner.critic.optimizer.eps",
        "learner.critic.optimizer.weight_decay",
    ),
}
"""Fields that keep their value; the key is the reason."""

FREE: dict[str, tuple[str, ...]] = {
    "the run folder says it": ("run.id", "run.directory"),
    "the model and the data stay the same": ("model.trust_remote_code", "data.datasource_key"),
    "later evaluations follow the new value; earlier ones stay": (
        "evaluation",
        "evaluation.data.path",
        "evaluation.data.split",
        "evaluation.data.input_key",
        "evaluation.data.label_key",
        "evaluation.data.datasource_key",
        "evaluation.data.apply_chat_template",
        "evaluation.data.input_template",
        "evaluation.data.shuffle",
        "evaluation.data.max_samples",
        "evaluation.data.overlong_prompts",
        "evaluation.every_steps",
        "evaluation.samples_per_prompt",
        "evaluation.temperature",
        "evaluation.max_new_tokens",
        "evaluation.should_pin_version",
    ),
    "later samples follow the new value": ("sampling.is_seeded",),
    "later steps follow the new value": (
        "algorithm.type",
        "algorithm.reward.normalize",
        "algorithm.reward.overlong_buffer_tokens",
        "algorithm.reward.overlong_penalty",
        "algorithm.reward.stop_properly_coef",
        "algorithm.reward.clip",
        "algorithm.advantage.gamma",
        "algorithm.advantage.gae_lambda",
        "algorithm.advantage.gae_over",
        "algorithm.advantage.whitening",
        "algorithm.advantage.mixed_version",
        "algorithm.loss.type",
        "algorithm.loss.aggregation",
        "algorithm.loss.constant_tokens",
        "algorithm.loss.clip_low",
        "algorithm.loss.clip_high",
        "algorithm.loss.dual_clip",
        "algorithm.correction.type",
        "algorithm.correction.ratio",
        "algorithm.correction.low",
        "algorithm.correction.high",
        "algorithm.correction.proximal",
        "algorithm.correction.m2_limit",
        "algorithm.correction.divergence",
        "algorithm.correction.divergence_limit",
        "algorithm.kl.estimator",
        "algorithm.kl.place",
        "algorithm.kl.target",
        "algorithm.kl.horizon",
        "algorithm.filter.score_range",
        "algorithm.filter.should_drop_zero_variance",
        "algorithm.entropy_coef",
        "algorithm.aux_loss_coef",
        "algorithm.value_clip",
        "algorithm.policy_frozen_steps",
        "learner.steps_per_batch",
        "learner.epochs_per_batch",
        "learner.optimizer.max_grad_norm",
        "learner.critic.optimizer.max_grad_norm",
    ),
    "the learning rate follows from the step alone": (
        "learner.optimizer.lr",
        "learner.optimizer.warmup_steps",
        "learner.optimizer.schedule",
        "learner.optimizer.min_lr_ratio",
        "learner.critic.optimizer.lr",
        "learner.critic.optimizer.warmup_steps",
        "learner.critic.optimizer.schedule",
        "learner.critic.optimizer.min_lr_ratio",
    ),
    "every process starts anew, and its settings with it": (
        "coordinator.address",
        "coordinator.heartbeat_interval_s",
        "coordinator.member_timeout_s",
        "coordinator.lease_ttl_s",
        "coordinator.max_attempts",
        "coordinator.max_failed_fraction",
        "coordinator.stall_timeout_s",
        "reward.address",
        "reward.function",
        "reward.timeout_s",
        "reward.num_processes",
        "reward.samples_per_call",
        "reward.start_timeout_s",
        "reward.should_probe",
        "reference",
        "reference.address",
        "reference.dtype",
        "reference.device",
        "reference.attention",
        "reference.tokens_per_batch",
        "reference.num_threads",
        "rollout.address",
        "rollout.num_workers",
        "rollout.engine.dtype",
        "rollout.engine.max_num_seqs",
        "rollout.engine.tensor_parallel_size",
        "rollout.engine.enforce_eager",
        "rollout.engine.gpu_memory_utilization",
        "rollout.engine.cpu_kv_cache_gib",
        "rollout.engine.enable_prefix_caching",
        "rollout.engine.extra",
        "rollout.max_open_groups",
        "rollout.kv",
        "rollout.scoring_timeout_s",
        "rollout.scoring_attempts",
        "rollout.start_timeout_s",
        "learner.address",
        "learner.device",
        "learner.attention",
        "learner.tokens_per_micro_batch",
        "learner.packing",
        "learner.parity",
        "learner.parity_tolerance",
        "learner.gradient_checkpointing",
        "learner.checkpoint.every_steps",
        "learner.checkpoint.every_minutes",
        "learner.checkpoint.max_kept",
        "learner.checkpoint.max_bytes",
        "learner.checkpoint.keep_best",
        "learner.checkpoint.best_is",
        "learner.checkpoint.should_export",
        "learner.num_threads",
        "learner.batch_timeout_s",
        "learner.silent_work_timeout_s",
        "learner.should_record_batches",
        "replay.payload_limit_bytes",
        "replay.timeout_s",
        "replay.memory_limit_bytes",
        "replay.outage_timeout_s",
        "weights.bucket_bytes",
        "weights.floor_bandwidth_bytes_per_s",
        "weights.prepare_timeout_s",
        "weights.transfer_timeout_s",
        "weights.commit_timeout_s",
        "weights.host",
        "weights.store_port",
    ),
}
"""Fields that may change; the key is the reason."""


@dataclass(frozen=True, slots=True)
class Limit:
    """The limit within which a field may change.

    Attributes:
        is_kept: a function of the old and the new configuration that tells whether the change is within the limit.
        reason: the reason for the limit.
        fix: the fix for the error message; ``{old}`` stands for the old value.
    """

    is_kept: Callable[[MeshConfig, MeshConfig], bool]
    reason: str
    fix: str = "use {old} or more"


LIMITED: dict[str, Limit] = {
    "training.steps": Limit(lambda old, new: new.training.steps >= old.training.steps, "it may only grow"),
    "training.epochs": Limit(lambda old, new: new.training.epochs >= old.training.epochs, "it may only grow"),
    "training.max_staleness": Limit(
        lambda old, new: new.training.max_staleness >= old.training.max_staleness,
        "it may only grow: older groups wait in Redis",
    ),
    "training.slots": Limit(
        lambda old, new: new.training.num_slots >= old.training.num_slots,
        "the number of slots may only grow: older groups wait in Redis",
        "raise it, or set it back to {old}",
    ),
    "coordinator.max_version_lag": Limit(
        lambda old, new: new.coordinator.max_version_lag >= old.coordinator.max_version_lag,
        "it may only grow: older groups wait in Redis",
    ),
    "replay.url": Limit(
        lambda old, new: without_password(old.replay.url or "") == without_password(new.replay.url or ""),
        "the groups of the run are in that Redis",
        "set it back to {old} (the password may be another)",
    ),
    "learner.ema_beta": Limit(
        lambda old, new: (old.learner.ema_beta is None) == (new.learner.ema_beta is None),
        "it decides whether the checkpoint holds an average of the policy",
        "set it as before: {old}",
    ),
}
"""Fields that may change within a limit, by dotted path."""

_REASON_OF_FIXED = {field: reason for reason, fields in FIXED.items() for field in fields}
_UNSHOWN = frozenset({"run.id", "run.directory"})


@dataclass(frozen=True, slots=True)
class Change:
    """A setting that differs between the run so far and its resumed part.

    Attributes:
        field: the dotted path of the setting.
        old: the value of the run so far; None also where the setting had no section.
        new: the value of the resumed part; None also where the setting has no section.
    """

    field: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.field}: {_shown(self.old)} → {_shown(self.new)}"


def check_changes(old: MeshConfig, new: MeshConfig) -> list[Change]:
    """Compare the configuration of the run so far with the configuration of its resumed part.

    Args:
        old: the configuration that the user asked for at the run's last start, with absolute paths.
        new: the configuration that the user asks for now, with absolute paths.

    Returns:
        The settings that change.

    Raises:
        ConfigError: a setting changes that may not change. The message names the field, both values, the reason and
            the fix.
    """
    changes = [change for change in _differences("", old, new) if change.field not in _UNSHOWN]
    for change in changes:
        limit = LIMITED.get(change.field)
        reason, fix = _REASON_OF_FIXED.get(change.field), "set it back to {old}"
        if limit is not None and not limit.is_kept(old, new):
            reason, fix = limit.reason, limit.fix
        if reason is not None:
            problem = f"{_shown(change.new)} differs from the {_shown(change.old)} of the run so far, and {reason}"
            raise ConfigError(change.field, problem, f"{fix.format(old=_shown(change.old))}, or start a run anew")
    return changes


def _differences(field: str, old: Any, new: Any) -> Iterator[Change]:
    if isinstance(old, Section) and isinstance(new, Section):
        for name in {**type(old).model_fields, **type(new).model_fields}:
            inner = f"{field}.{name}" if field else name
            yield from _differences(inner, getattr(old, name, None), getattr(new, name, None))
    elif old != new:
        yield Change(field, old, new)


def _shown(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, str) and "://" in value:
        return without_password(value)
    return "a section" if isinstance(value, Section) else str(value)
