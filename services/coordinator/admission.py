"""How many groups to open, and when the last one has been opened: pure functions of the ledger's counts.

``A`` slots bound what is open; ``steps · B`` bounds what may still succeed; the dataset bounds what can be opened at
all. A group that FAILED or was FILTERED is replaced by the next prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rollmesh.types import GroupState

ENDED_WITHOUT_TRAINING = (GroupState.FAILED, GroupState.FILTERED)
TRAINED = (GroupState.TRAINED, GroupState.RETIRED)
SUCCEEDED = (GroupState.READY, GroupState.BATCHED, *TRAINED)


@dataclass(frozen=True, slots=True)
class Admission:
    """The run's bounds.

    Attributes:
        num_slots: A.
        groups_per_batch: B.
        steps: optimiser batches that the configuration asks for.
        num_prompts: prompts in all epochs together.
    """

    num_slots: int
    groups_per_batch: int
    steps: int
    num_prompts: int

    @property
    def num_wanted(self) -> int:
        """Groups that are to be trained in the whole run, if none fails."""
        return min(self.steps * self.groups_per_batch, self.num_prompts)

    @property
    def num_steps(self) -> int:
        """Optimiser batches in the whole run; the last one may be smaller."""
        return -(-self.num_wanted // self.groups_per_batch)

    def num_to_open(self, num_groups: Mapping[GroupState, int], num_opened: int, num_slots_used: int) -> int:
        """Groups to open now."""
        num_ended = sum(num_groups.get(state, 0) for state in ENDED_WITHOUT_TRAINING)
        return max(
            0,
            min(
                self.num_slots - num_slots_used,
                self.steps * self.groups_per_batch - (num_opened - num_ended),
                self.num_prompts - num_opened,
            ),
        )

    def is_complete(self, num_groups: Mapping[GroupState, int], num_opened: int) -> bool:
        """Whether it is certain that no further group will be opened. While a group may still fail and be replaced,
        it is not."""
        num_succeeded = sum(num_groups.get(state, 0) for state in SUCCEEDED)
        return num_opened >= self.num_prompts or num_succeeded >= self.steps * self.groups_per_batch

    def shortfall(self, num_groups: Mapping[GroupState, int]) -> str:
        """What a run that used up its prompts before its last step was short of, in one sentence; else empty."""
        num_trained = sum(num_groups.get(state, 0) for state in TRAINED)
        wanted = self.steps * self.groups_per_batch
        if num_trained >= wanted or sum(num_groups.values()) < self.num_prompts:
            return ""
        used_up = (
            f"the prompts were used up after {-(-num_trained // self.groups_per_batch)} of {self.steps} steps: of "
            f"{self.num_prompts}, {num_trained} were trained, {num_groups.get(GroupState.FILTERED, 0)} filtered and "
            f"{num_groups.get(GroupState.FAILED, 0)} failed"
        )
        if not num_trained:
            return f"{used_up}; accounting.json has the reasons"
        factor = math.ceil(10 * wanted / num_trained) / 10
        return f"{used_up}; it takes {factor:g} times as many: raise training.epochs, or lower training.steps"


def failed_too_often(num_groups: Mapping[GroupState, int], max_fraction: float, groups_per_batch: int) -> bool:
    """Whether at least a batch of groups, and more than ``max_fraction`` of those that came to an end, FAILED."""
    num_failed = num_groups.get(GroupState.FAILED, 0)
    num_ended = num_failed + sum(num_groups.get(state, 0) for state in (*SUCCEEDED, GroupState.FILTERED))
    return num_failed >= groups_per_batch and num_failed > max_fraction * num_ended
