"""Which waiting requests go into the next forward pass. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def next_batch(lengths: Sequence[int], tokens_per_batch: int) -> list[int]:
    """Choose the batch that holds the oldest request, together with others of about its length.

    Requests are sorted by length and cut into batches whose padded size, longest length × number of requests, stays
    within the budget; the one with the oldest request is next. So padding is small and nobody waits for ever.

    Args:
        lengths: tokens of each waiting request, oldest first; not empty.
        tokens_per_batch: the budget; at least the longest length.

    Returns:
        Indices into ``lengths``, shortest request first; 0 is among them.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batch: list[int] = []
    for index in order:
        if lengths[index] * (len(batch) + 1) > tokens_per_batch and batch:
            if 0 in batch:
                break
            batch = []
        batch.append(index)
    return batch if 0 in batch else [0]
