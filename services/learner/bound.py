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

    The number of a version only grows, also from one lineage to the next. So the difference of two numbers is the
    age, whatever the lineages: ``1.9`` is two versions after ``0.7``.

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
            youngest = 0 if span.version.lineage == learner.lineage else 1  # a new lineage begins with a new number
            if span.version > learner or not youngest <= age <= bound:
                raise ReplayError(
                    f"group {group.group_id} has tokens of version {span.version}, but the learner is at "
                    f"{learner} and the staleness bound is {bound}: admission is broken"
                )
