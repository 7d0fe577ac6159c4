"""The whole mesh file: its sections, and the rules that span several sections."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import model_validator

from rollmesh.algorithms.config import AlgorithmSection
from rollmesh.algorithms.rules import check_objective, objective_warnings
from rollmesh.config import (
    DataSection,
    EvaluationSection,
    ModelSection,
    ReplaySection,
    RunSection,
    SamplingSection,
    Section,
    TrainingSection,
    WeightsSection,
    dump_yaml,
    load_yaml,
    validate,
)
from rollmesh.errors import ConfigError
from services.coordinator.config import CoordinatorSection
from services.learner.config import LearnerSection
from services.reference.config import ReferenceSection
from services.reward.config import RewardSection
from services.rollout.config import RolloutSection


class ScorerConfig(Section):
    """A file that describes reward and reference servers alone."""

    run: RunSection
    """The name, the seed and the folder of the run."""
    model: ModelSection | None = None
    """The model of the policy."""
    coordinator: CoordinatorSection = CoordinatorSection()
    """Settings of the coordinator, which leases groups to workers and commits versions."""
    reward: RewardSection = RewardSection()
    """Settings of the reward server."""
    reference: ReferenceSection | None = None
    """Settings of the reference server. The section is needed where algorithm.kl.coef is greater than 0."""

    def check_stands_alone(self) -> None:
        """Raise ConfigError if the file lacks a setting that a server on its own needs."""
        if self.reward.function is None and self.reference is None:
            fix = "set reward.function, add `reference:`, or for a mesh add `data:`, `training:` and `sampling:`"
            raise ConfigError("configuration", "describes no server and no mesh", fix)
        if self.reference is not None and self.model is None:
            raise ConfigError("model", "is missing, and the reference server loads it", "add a `model:` section")
        addresses = {"coordinator.address": self.coordinator.address}
        if self.reward.function is not None:
            addresses["reward.address"] = self.reward.address
        if self.reference is not None:
            addresses["reference.address"] = self.reference.address
        fix = "name the port that the mesh's file names, or for a mesh add `data:`, `training:` and `sampling:`"
        for place, address in addresses.items():
            if address.endswith(":0"):
                raise ConfigError(place, f"{address} leaves the port open", fix)


class MeshConfig(ScorerConfig):
    """A file that describes a whole mesh: reinforcement learning, with every service."""

    model: ModelSection
    """The model of the policy."""
    data: DataSection
    """The dataset of training prompts."""
    evaluation: EvaluationSection | None = None
    """Settings of the evaluation on held-out prompts; with null there is no evaluation."""
    training: TrainingSection
    """The size of a batch, the number of steps, and the permitted staleness of samples."""
    sampling: SamplingSection
    """Settings of the sampling of training samples by the engines."""
    algorithm: AlgorithmSection = AlgorithmSection()
    """The objective."""
    rollout: RolloutSection = RolloutSection()
    """Settings of the rollout workers and of their engines."""
    learner: LearnerSection = LearnerSection()
    """Settings of the learner, which trains the policy."""
    replay: ReplaySection = ReplaySection()
    """Settings of Redis, the store of all groups of the run."""
    weights: WeightsSection = WeightsSection()
    """Settings of the broadcast of new weights to the engines."""

    @property
    def has_reference(self) -> bool:
        """Whether the mesh runs a reference service."""
        return self.algorithm.needs_reference

    @property
    def warnings(self) -> list[str]:
        """Warnings about settings that work and that the user probably does not mean, a sentence each."""
        return objective_warnings(self.algorithm, self.training, self.sampling)

    @model_validator(mode="after")
    def _cross_check(self) -> MeshConfig:
        """Apply the rules that span sections. The code of each rule lies beside the section that the rule names."""
        self.sampling.check_room(self.model)
        self.learner.check_sample_fits(self.model)
        if self.has_reference and self.reference is None:
            raise ConfigError(
                "algorithm.kl.coef",
                f"{self.algorithm.kl.coef:g} needs reference log-probabilities but there is no reference section",
                "add a `reference:` section or set the coefficient to 0",
            )
        if self.has_reference and self.reference is not None:
            self.reference.check_sample_fits(self.model)
        check_objective(self.algorithm, self.training, self.sampling, self.learner.updates_per_batch)
        self.learner.check_batch_divides(self.training)
        self.reward.check_is_given()
        self.reward.check_is_awaited(self.rollout.scoring_timeout_s)
        return self


def load_mesh(path: Path, overrides: Sequence[str] = ()) -> MeshConfig:
    """Return the configuration in a mesh file, after overrides and checks.

    Raises:
        ConfigError: the file has a fault. One sentence names the place, the value and the fix.
    """
    return validate(MeshConfig, load_yaml(path, overrides))


def load_config(path: Path, overrides: Sequence[str] = ()) -> MeshConfig | ScorerConfig:
    """Return the configuration in a mesh file, or in a file that describes reward and reference servers alone.

    A file of the second kind has none of the sections that only a mesh has, such as `training`.

    Raises:
        ConfigError: the file has a fault. One sentence names the place, the value and the fix.
    """
    tree = load_yaml(path, overrides)
    if tree.keys() - ScorerConfig.model_fields.keys():
        return validate(MeshConfig, tree)
    config = validate(ScorerConfig, tree)
    config.check_stands_alone()
    return config


def dump_mesh(config: ScorerConfig) -> str:
    """Return the resolved configuration as YAML; `load_mesh` reads it back to the same value."""
    return dump_yaml(config.model_dump(mode="json"))
