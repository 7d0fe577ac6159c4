"""How far the mesh may run ahead of the learner: pure functions of the configuration.

``A`` slots, ``B`` groups in a batch, ``η = max_staleness``. A group holds a slot from its opening until the version it
was trained into is committed, so with ``A ≤ (η + 1) · B`` at most ``η`` batches lie ahead of the one being trained.
"""

from __future__ import annotations


def window(num_slots: int) -> int:
    """``W = max(1, ⌊0.3 · A⌋)``: how far behind the oldest live group a batch may reach.

    While the group at place ``s`` of the line is being worked on, groups up to place ``s + W - 1`` may be taken; so one
    straggler is overtaken by ``W - 1`` groups at most, and ``W = 1`` is strict first in, first out.
    """
    if num_slots < 1:
        raise ValueError(f"num_slots must be at least 1, not {num_slots}")
    return max(1, 3 * num_slots // 10)


def staleness_bound(max_staleness: int, num_slots: int, groups_per_batch: int, max_version_lag: int) -> int:
    """``η + ⌈(W - 1) / B⌉ + d``: no trained sample is staler, in versions.

    ``η`` batches may lie ahead of a group when it is leased, the ``W - 1`` groups that may overtake it fill
    ``⌈(W - 1) / B⌉`` more, and its worker may have been ``d = max_version_lag`` versions behind.
    """
    if max_staleness < 0 or max_version_lag < 0 or groups_per_batch < 1:
        raise ValueError(f"not a configuration: η = {max_staleness}, B = {groups_per_batch}, d = {max_version_lag}")
    num_overtaking = window(num_slots) - 1
    return max_staleness + -(-num_overtaking // groups_per_batch) + max_version_lag
