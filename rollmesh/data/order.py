"""The order in which a run uses the rows of a dataset: a pure function of (number of rows, seed, epoch).

The order is the same in every process, on every platform and in every version of the libraries. So a restarted
coordinator needs no saved state: it continues where the ledger ends. And a synchronous loop that uses this module gets
the same batches as the mesh at ``max_staleness`` 0.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rollmesh.types import PromptId

_SEED_MASK = (1 << 64) - 1


def permutation(num_rows: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return the order of epoch ``epoch``: int64 [num_rows], each row once.

    Each row gets one raw 64-bit word of PCG64 with the seed ``SeedSequence(seed, spawn_key=(epoch,))``, and the rows
    are sorted by these words. numpy guarantees the streams of both for ever. There is no such guarantee for
    `Generator.permutation` and `random.shuffle`, so neither is used. Negative seeds are taken modulo 2**64.

    >>> permutation(num_rows=5, seed=0, epoch=0).tolist(), permutation(num_rows=5, seed=0, epoch=1).tolist()
    ([3, 1, 4, 2, 0], [1, 3, 2, 0, 4])
    """
    words = np.random.PCG64(np.random.SeedSequence(seed & _SEED_MASK, spawn_key=(epoch,))).random_raw(num_rows)
    return np.argsort(words, kind="stable")


class PromptOrder:
    """The line of all prompts of a run: epoch after epoch, each epoch in its own order.

    Args:
        dataset: the dataset's name in the prompt ids.
        num_rows: the number of rows in one epoch; at least 1.
        epochs: the number of passes over the dataset; at least 1.
        seed: the seed of the shuffle.
        should_shuffle: False keeps the rows in the order of the file.

    Raises:
        ValueError: there are no rows or no epochs.
    """

    def __init__(self, dataset: str, num_rows: int, epochs: int, seed: int, should_shuffle: bool) -> None:
        if num_rows < 1 or epochs < 1:
            raise ValueError(f"an order needs rows and epochs, got {num_rows} rows and {epochs} epochs")
        self._dataset = dataset
        self._num_rows = num_rows
        self._epochs = epochs
        self._seed = seed
        self._should_shuffle = should_shuffle
        self._cached_epoch = -1
        self._cached: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        """Return the number of prompts in the whole run."""
        return self._num_rows * self._epochs

    def at(self, position: int) -> PromptId:
        """Return the prompt at ``position``, from 0.

        Raises:
            IndexError: the position lies outside the run's prompts.
        """
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} lies outside the {len(self)} prompts of the run")
        epoch, offset = divmod(position, self._num_rows)
        return PromptId(self._dataset, epoch, self._row(epoch, offset))

    def slice(self, start: int, stop: int) -> list[PromptId]:
        """Return the prompts at positions ``start`` to ``min(stop, len(self))``."""
        return [self.at(position) for position in range(start, min(stop, len(self)))]

    def _row(self, epoch: int, offset: int) -> int:
        if not self._should_shuffle:
            return offset
        if epoch != self._cached_epoch:
            self._cached, self._cached_epoch = permutation(self._num_rows, self._seed, epoch), epoch
        return int(self._cached[offset])
