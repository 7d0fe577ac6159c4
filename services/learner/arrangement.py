"""The choice of the cheapest way of batching that the loaded models compute correctly."""

from __future__ import annotations

from rollmesh.models.probe import choose_batching, ways_of_batching
from rollmesh.models.rows import Batching
from services.learner.checkpoint import Learnables
from services.learner.config import LearnerSection
from services.learner.ranks import Ranks


def choose_arrangement(section: LearnerSection, learnables: Learnables, ranks: Ranks) -> Batching:
    """Return the cheapest way of batching that both policy and critic compute correctly. Collective.

    Policy and critic read the same micro-batches, so the ways of batching are tried on both.

    Raises:
        ConfigError: `learner.attention` names an implementation that is wrong for a model.
    """
    engines = [learnables.policy, *([learnables.critic.engine] if learnables.critic is not None else [])]
    probes = [engine.examine() for engine in engines]
    candidates = ways_of_batching([engine.attention for engine in engines], section.packing)
    return choose_batching(probes, candidates, should_log=ranks.is_first)
