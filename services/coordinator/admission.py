"""How many groups to open, and when the last group has been opened: pure functions of the ledger's counts.

Three numbers bound the groups: ``A`` slots bound the open groups; ``steps · B`` bounds the groups that may succeed; the
dataset bounds all groups of the run. The next prompt replaces a group that FAILED or was FILTERED.
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
        num_slots: A, groups that may be open at the same time.
        groups_per_batch: B, groups in an optimiser batch.
        steps: optimiser batches that the configuration asks for.
        num_prompts: prompts in all epochs together.
    """

    num_slots: int
    groups_per_batch: int
    steps: int
    num_prompts: int

    @property
    def num_wanted(self) -> int:
        """Groups that the whole run trains if no group fails: 10 steps of 4 groups from 6 prompts train 6 groups."""
        return min(self.steps * self.groups_per_batch, self.num_prompts)

    @property
    def num_steps(self) -> int:
        """Optimiser batches in the whole run. The last batch may be smaller: 6 groups in batches of 4 are 2 batches."""
        return -(-self.num_wanted // self.groups_per_batch)

    def num_to_open(self, num_groups: Mapping[GroupState, int], num_opened: int, num_slots_used: int) -> int:
        """Return the number of groups to open now.

        With 8 slots of which 5 are used, 10 steps of 4 groups and 100 prompts, of which 8 are opened: 3 groups.
        """
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
        """Return whether no further group can be opened: all prompts are used up, or enough groups succeeded.

        A group that is not READY yet may still fail and need a replacement.
        """
        num_succeeded = sum(num_groups.get(state, 0) for state in SUCCEEDED)
        return num_opened >= self.num_prompts or num_succeeded >= self.steps * self.groups_per_batch

    def shortfall(self, num_groups: Mapping[GroupState, int]) -> str:
        """Return a sentence about a run that used up its prompts before its last step; an empty text for other runs."""
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
        return (
            f"{used_up}; the run needs {factor:g} times as many prompts: raise training.epochs, or lower training.steps"
        )


def failed_too_often(num_groups: Mapping[GroupState, int], max_fraction: float, groups_per_batch: int) -> bool:
    """Return whether too many groups FAILED: at least a batch, and more than ``max_fraction`` of the decided groups.

    Decided groups are READY or later, FILTERED or FAILED. With ``max_fraction`` 0.1 and batches of 4, 5 FAILED groups
    of 40 are too many (0.125), and 4 of 40 are not (0.1).
    """
    num_failed = num_groups.get(GroupState.FAILED, 0)
    num_ended = num_failed + sum(num_groups.get(state, 0) for state in (*SUCCEEDED, GroupState.FILTERED))
    return num_failed >= groups_per_batch and num_failed > max_fraction * num_ended
