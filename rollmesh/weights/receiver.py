"""The engine's side of a transfer: bytes arrive in buffers beside the live weights and wait for the commit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rollmesh.errors import DeadlineError
from rollmesh.types import WeightPlan
from rollmesh.weights.buckets import unpack_bucket
from rollmesh.weights.digest import TransferDigest
from rollmesh.weights.group import Broadcast, WeightGroup
from rollmesh.weights.plan import bucket_num_bytes, num_buckets
from rollmesh.weights.sender import bucket_bytes


@dataclass(frozen=True, slots=True)
class Received:
    """A transfer that has arrived: the digest and the number of its bytes, and its duration in seconds."""

    digest: bytes
    num_bytes: int
    transfer_s: float


class WeightReceiver:
    """Buffers for one whole set of weights in host memory, which stay from transfer to transfer.

    The buffers are in host memory even where the group's device is a GPU, because the engine has taken nearly all of
    the GPU's memory. There a bucket arrives in a staging buffer on the GPU and is copied to the host.

    Args:
        device: the group's device.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._buffers: list[torch.Tensor] = []
        self._staging: torch.Tensor | None = None
        self._plan: WeightPlan | None = None

    def receive(self, group: WeightGroup, plan: WeightPlan, deadline_s: float) -> Received:
        """Receive every bucket of the plan. The first byte overwrites the previous transfer.

        Raises:
            DeadlineError: the transfer did not end in time.
            WeightTransferError: the sender or another member is gone, or the group was closed.
        """
        started = time.monotonic()
        self.drop()
        self._reserve(plan)
        digest = TransferDigest()
        arriving = self._start(group, plan, 0, started, deadline_s)
        for index in range(num_buckets(plan)):
            arriving.wait()
            self._store(index)
            # The next bucket travels while this bucket is hashed.
            if index + 1 < num_buckets(plan):
                arriving = self._start(group, plan, index + 1, started, deadline_s)
            digest.add(bucket_bytes(self._buffers[index]))
        self._plan = plan
        return Received(digest.digest(), digest.num_bytes, time.monotonic() - started)

    @property
    def is_complete(self) -> bool:
        """Whether a whole transfer is held."""
        return self._plan is not None

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the received tensors by name, in the plan's order: views that are valid until the next `receive`."""
        assert self._plan is not None, "nothing was received"
        for index, buffer in enumerate(self._buffers):
            yield from unpack_bucket(self._plan, index, buffer)

    def drop(self) -> None:
        """Forget the received transfer; the memory stays for the next transfer."""
        self._plan = None

    def _reserve(self, plan: WeightPlan) -> None:
        sizes = [bucket_num_bytes(plan, index) for index in range(num_buckets(plan))]
        if [buffer.numel() for buffer in self._buffers] == sizes:
            return
        # Fresh pages cost several times as much as the copy, so the buffers outlive a transfer.
        is_on_gpu = self._device.type == "cuda"
        self._buffers = []
        self._buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=is_on_gpu) for size in sizes]
        self._staging = torch.empty(max(sizes), dtype=torch.uint8, device=self._device) if is_on_gpu else None

    def _start(self, group: WeightGroup, plan: WeightPlan, index: int, started: float, deadline_s: float) -> Broadcast:
        remaining_s = started + deadline_s - time.monotonic()
        if remaining_s <= 0:
            raise DeadlineError(f"receiving took over {deadline_s:.1f} s: bucket {index} of {num_buckets(plan)}")
        buffer = self._buffers[index]
        return group.start_broadcast(buffer if self._staging is None else self._staging[: buffer.numel()], remaining_s)

    def _store(self, index: int) -> None:
        if self._staging is not None:
            buffer = self._buffers[index]
            buffer.copy_(self._staging[: buffer.numel()])
