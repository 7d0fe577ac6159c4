"""The whole mesh file: composes the sections, and applies the rules that span several of them."""

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
    """What the servers that score samples need: reward and reference. All of a file that describes them alone."""

    run: RunSection
    model: ModelSection | None = None
    coordinator: CoordinatorSection = CoordinatorSection()
    reward: RewardSection = RewardSection()
    reference: ReferenceSection | None = None
    """Needed where algorithm.kl.coef is greater than 0."""

    def check_stands_alone(self) -> None:
        """Raises ConfigError if the file does not say what a server on its own has to know."""
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
    """One mesh file: reinforcement learning, with every service."""

    model: ModelSection
    data: DataSection
    evaluation: EvaluationSection | None = None
    training: TrainingSection
    sampling: SamplingSection
    algorithm: AlgorithmSection = AlgorithmSection()
    rollout: RolloutSection = RolloutSection()
    learner: LearnerSection = LearnerSection()
    replay: ReplaySection = ReplaySection()
    weights: WeightsSection = WeightsSection()

    @property
    def has_reference(self) -> bool:
        """Whether the mesh runs a reference service."""
        return self.algorithm.needs_reference

    @property
    def warnings(self) -> list[str]:
        """What works and is probably not meant, a sentence each."""
        return objective_warnings(self.algorithm, self.training, self.sampling)

    @model_validator(mode="after")
    def _cross_check(self) -> MeshConfig:
        """The rules that span sections; each lies beside the section that it names."""
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
    """Read, override and validate a mesh file.

    Raises:
        ConfigError: one sentence with the place, the value and the fix.
    """
    return validate(MeshConfig, load_yaml(path, overrides))


def load_config(path: Path, overrides: Sequence[str] = ()) -> MeshConfig | ScorerConfig:
    """Read a mesh file, or a file that describes scorers alone: it has none of the sections that a mesh adds.

    Raises:
        ConfigError: one sentence with the place, the value and the fix.
    """
    tree = load_yaml(path, overrides)
    if tree.keys() - ScorerConfig.model_fields.keys():
        return validate(MeshConfig, tree)
    config = validate(ScorerConfig, tree)
    config.check_stands_alone()
    return config


def dump_mesh(config: ScorerConfig) -> str:
    """The resolved configuration as YAML that `load_mesh` reads back to the same value."""
    return dump_yaml(config.model_dump(mode="json"))
