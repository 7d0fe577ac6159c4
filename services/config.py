"""The whole mesh file: composes the sections, and applies the rules that span several of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, model_validator

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


class MeshConfig(Section):
    """One mesh file."""

    run: RunSection
    model: ModelSection
    data: DataSection
    evaluation: EvaluationSection | None = None
    training: TrainingSection
    sampling: SamplingSection
    algorithm: AlgorithmSection = AlgorithmSection()
    coordinator: CoordinatorSection = CoordinatorSection()
    rollout: RolloutSection = RolloutSection()
    reward: RewardSection = RewardSection()
    reference: ReferenceSection | None = Field(default=None)
    """Needed where algorithm.kl.coef is greater than 0."""
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


def dump_mesh(config: MeshConfig) -> str:
    """The resolved configuration as YAML that `load_mesh` reads back to the same value."""
    return dump_yaml(config.model_dump(mode="json"))
