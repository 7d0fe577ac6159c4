"""How the sequences of a batch may share forward passes: what is cheapest among what the loaded models get right."""

from __future__ import annotations

from rollmesh.models.probe import choose_batching, ways_of_batching
from rollmesh.models.rows import Batching
from services.learner.checkpoint import Learnables
from services.learner.config import LearnerSection
from services.learner.ranks import Ranks


def choose_arrangement(section: LearnerSection, learnables: Learnables, ranks: Ranks) -> Batching:
    """Try on policy and critic, which read the same micro-batches, how sequences may be packed. Collective.

    Raises:
        ConfigError: `learner.attention` names an implementation that is wrong for a model.
    """
    engines = [learnables.policy, *([learnables.critic.engine] if learnables.critic is not None else [])]
    probes = [engine.examine() for engine in engines]
    candidates = ways_of_batching([engine.attention for engine in engines], section.packing)
    return choose_batching(probes, candidates, should_log=ranks.is_first)
