"""The staleness bound, asserted on every batch."""

from __future__ import annotations

from collections.abc import Iterable

from rollmesh.errors import ReplayError
from rollmesh.replay.staleness import StalenessWindow
from rollmesh.types import Group, PolicyVersion
from services.config import MeshConfig


def staleness_window(config: MeshConfig) -> StalenessWindow:
    """The window of the run's queue, with its bound."""
    training = config.training
    return StalenessWindow(
        training.max_staleness, training.num_slots, training.prompts_per_step, config.coordinator.max_version_lag
    )


def check_staleness(groups: Iterable[Group], learner: PolicyVersion, bound: int) -> None:
    """Refuse a batch with a sample that is older than admission may let through, or newer than the learner.

    Args:
        groups: about to be trained.
        learner: the version that the step starts from.
        bound: `rollmesh.replay.staleness.StalenessWindow.bound` of the run, in versions.

    Raises:
        ReplayError: names the group, its version and the bound.
    """
    for group in groups:
        for span in (span for sample in group.samples for span in sample.version_spans):
            age = learner.number - span.version.number
            if span.version.lineage != learner.lineage or not 0 <= age <= bound:
                raise ReplayError(
                    f"group {group.group_id} has tokens of version {span.version}, but the learner is at "
                    f"{learner} and the staleness bound is {bound}: admission is broken"
                )
