"""How old a sample may be when the learner trains on the sample: the window of the queue, and the bound."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StalenessWindow:
    """The settings that bound staleness: ``η``, ``A``, ``B`` and ``d``.

    The queue gives out groups in the order in which they were opened, except that a batch may pass over groups that
    are still being worked on. While the oldest live group (pending, leased or ready) stands at place ``s`` of the line,
    the learner may take ready groups at places ``s`` to ``s + W - 1``. ``W`` is `size`.

    **Proof of the bound.** Let the learner train group ``g``, which stands at place ``s``, in step ``k``. Step ``k``
    starts from version ``k - 1``. Let ``c`` be the version that was committed when ``g`` was opened. Look at the groups
    of the steps ``c + 1`` to ``k - 1``:

    * A group that stands *before* ``g`` held a slot when ``g`` was opened, because a slot is released only when the
      version that its group was trained into is committed. ``g`` held one of the ``A`` slots itself. So at most
      ``A - 1`` of the groups stand before ``g``.
    * A group that stands *behind* ``g`` was taken while ``g`` was live. The oldest live group stood at place ``s`` or
      before it, so that the group stands at ``s + 1`` to ``s + W - 1``. So at most ``W - 1`` groups overtook ``g``.

    Each of these ``k - 1 - c`` steps took ``B`` groups (only the last batch of a run may be smaller, and no step
    follows it), therefore ``(k - 1 - c) · B ≤ A + W - 2``. The worker that leases ``g``, at its opening or later,
    serves version ``c - d`` or a newer one. So the staleness is at most

        ``(k - 1) - (c - d)  ≤  ⌊(A + W - 2) / B⌋ + d  =  η + ⌈(W - 1) / B⌉ + d``

    where the right-hand form holds for ``A = (η + 1) · B``; fewer slots can only lower the bound. A schedule that
    reaches it: lease the last of the ``A`` open groups, finish all others first, and let ``W - 1`` groups overtake it.

    **Worked example.** ``η = 1``, ``B = 32``, ``d = 0``: ``A = 64`` and ``W = 33``. Group 63 is leased at version 0.
    Step 1 takes groups 0 to 31. Step 2 takes groups 32 to 62 and 64, which is the first to overtake. Group 63 ends, and
    step 3, which starts from version 2, trains it. Its staleness is 2, and ``⌊(64 + 33 - 2) / 32⌋ = 2``.

    Attributes:
        max_staleness: η, in versions.
        num_slots: A, groups that may be open at the same time: ``B ≤ A ≤ (η + 1) · B``.
        groups_per_batch: B.
        max_version_lag: d, versions that a worker may be behind the committed version and still get leases.
    """

    max_staleness: int
    num_slots: int
    groups_per_batch: int
    max_version_lag: int = 0

    def __post_init__(self) -> None:
        eta, slots, batch = self.max_staleness, self.num_slots, self.groups_per_batch
        if eta < 0 or batch < 1 or self.max_version_lag < 0 or not batch <= slots <= (eta + 1) * batch:
            raise ValueError(f"{self} breaks η ≥ 0, B ≥ 1, d ≥ 0 or B ≤ A ≤ (η + 1) · B")

    @property
    def size(self) -> int:
        """``W``, in places of the line: 1 where ``A = B``, else ``B + 1``.

        ``A = B`` (always so at ``η = 0``) means that training is synchronous and the order strict.

        ``B + 1`` is the smallest size with which one straggler never stops the learner for the time of a step: even
        where the straggler is the first of its batch, the ``B`` groups behind it fill a batch. A window of
        ``k · B + 1`` would let ``k`` such batches pass, and add ``k`` to the bound instead of 1.
        """
        return 1 if self.num_slots == self.groups_per_batch else self.groups_per_batch + 1

    @property
    def bound(self) -> int:
        """The largest staleness that a trained token can have, in versions. The class has the proof."""
        return (self.num_slots + self.size - 2) // self.groups_per_batch + self.max_version_lag
