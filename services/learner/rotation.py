"""The choice of the checkpoints that are deleted: by number and by size, the best and the newest last."""

from __future__ import annotations

from collections.abc import Mapping


def steps_to_drop(sizes: Mapping[int, int], best: int | None, max_kept: int, max_bytes: int | None) -> list[int]:
    """Return the steps whose checkpoint and export are to be deleted, in the order of deletion.

    The newest step always stays. Of the others, the oldest go first. The best step stays besides the newest
    ``max_kept``; only ``max_bytes`` can drop it, after all others but the newest.

    With 100 bytes each, the steps 10, 20, 30 and 40, of which 10 is the best, and ``max_kept`` 2: step 20 goes. With
    ``max_bytes`` 250, step 30 goes as well; with 150 also step 10.

    Args:
        sizes: the bytes on disk of each step's checkpoint and export together.
        best: the best of the steps; None where no step has a score.
        max_kept: the number of newest steps that stay.
        max_bytes: the most bytes of all steps that stay; None for no limit.
    """
    steps = sorted(sizes)
    droppable = [step for step in steps[:-1] if step != best] + [step for step in steps[:-1] if step == best]
    dropped = [step for step in steps[:-max_kept] if step != best]
    total = sum(sizes.values()) - sum(sizes[step] for step in dropped)
    for step in droppable:
        if step not in dropped and max_bytes is not None and total > max_bytes:
            dropped.append(step)
            total -= sizes[step]
    return dropped
