"""Chooses the waiting requests of the next forward pass. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence


def next_batch(lengths: Sequence[int], tokens_per_batch: int) -> list[int]:
    """Choose the batch that holds the oldest request and further requests of about the same length.

    The requests are sorted by length and cut into batches. The padded size of a batch, its longest length × its number
    of requests, stays within the budget. The batch with the oldest request is next. So padding is small, and no request
    waits for ever. Lengths of 5, 3, 9, 4 with a budget of 12 are cut into [3, 4], [5] and [9]; the next batch is [5].

    Args:
        lengths: the number of tokens of each waiting request, oldest first; not empty.
        tokens_per_batch: the budget; at least the longest length.

    Returns:
        Indices into ``lengths``, the shortest request first. Index 0 is among them.
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
