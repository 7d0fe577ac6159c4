"""Reception of transfers in the background of a process that generates tokens at the same time.

::

    owner's thread          background thread, one per membership of an epoch
    begin_join     ──────►  WeightGroup.join
    begin_receive  ──────►  WeightReceiver.receive ──► buffers
    poll           ◄──────  the digest, or the error
    tensors        ◄────────────────────────────────── buffers

No method waits. An abort closes the group, so that a receiving background thread ends soon. A background thread that
waits for other members to join ends by its deadline at the latest, and then closes its unused group.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from rollmesh.errors import WeightTransferError
from rollmesh.types import WeightEpoch, WeightPlan
from rollmesh.weights.group import WeightGroup
from rollmesh.weights.receiver import Received, WeightReceiver


class WeightInbox:
    """The receiving end of one engine process. All methods belong to one thread.

    Args:
        device: the device of the group's tensors.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._receiver = WeightReceiver(self._device)
        self._membership: _Membership | None = None
        self._transfer: Future[Received] | None = None

    def begin_join(self, epoch: WeightEpoch, rank: int, deadline_s: float) -> None:
        """Begin to join the epoch, unless this process is a member already. `poll` raises the errors of joining."""
        self._forget_transfer()
        membership = self._membership
        if membership is not None and membership.epoch == epoch and membership.is_usable:
            return
        if membership is not None:
            membership.close()
        self._membership = _Membership(epoch, rank, deadline_s, self._device)

    def begin_receive(self, plan: WeightPlan, deadline_s: float) -> None:
        """Begin to receive one transfer; ``deadline_s`` counts from the moment when all members have joined.

        Raises:
            WeightTransferError: `begin_join` was not called, or `abort` was called after it.
        """
        if self._membership is None:
            raise WeightTransferError("there is no weight group to receive from")
        self._forget_transfer()
        self._transfer = self._membership.receive(self._receiver, plan, deadline_s)

    def poll(self) -> Received | None:
        """Return the transfer that has arrived; None while the transfer is under way.

        Raises:
            DeadlineError: joining or receiving took too long.
            WeightTransferError: joining or receiving failed, or no transfer was begun.
        """
        if self._transfer is None:
            raise WeightTransferError("no transfer is under way")
        return self._transfer.result() if self._transfer.done() else None

    def tensors(self, digest: bytes) -> Iterator[tuple[str, torch.Tensor]]:
        """Return the tensors of this digest's transfer, in the plan's order; valid until the next `begin_receive`.

        Raises:
            WeightTransferError: the inbox holds another transfer or no transfer.
        """
        received = self.poll()
        if received is None or received.digest != digest:
            raise WeightTransferError("the weights to be loaded are not those that were received")
        return self._receiver.tensors()

    def drop(self) -> None:
        """Forget the received transfer; the membership and the memory stay for the next transfer."""
        self._forget_transfer()

    def abort(self) -> None:
        """Leave the group, and forget a transfer that was received or is under way."""
        self._forget_transfer()
        if self._membership is not None:
            self._membership.close()
            self._membership = None

    def _forget_transfer(self) -> None:
        transfer, self._transfer = self._transfer, None
        if transfer is not None and (not transfer.done() or transfer.exception() is not None):
            # The transport may still write into these buffers, so the next transfer needs others.
            self._receiver = WeightReceiver(self._device)
        self._receiver.drop()


class _Membership:
    """The group of one epoch, and the thread that joins it and receives from it."""

    def __init__(self, epoch: WeightEpoch, rank: int, deadline_s: float, device: torch.device) -> None:
        self.epoch = epoch
        self._device = device
        self._lock = threading.Lock()
        self._group: WeightGroup | None = None
        self._is_closed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._joining = self._thread.submit(self._join, rank, deadline_s)

    @property
    def is_usable(self) -> bool:
        """Whether the group is still being built, or is complete and not closed."""
        if not self._joining.done():
            return True
        return self._joining.exception() is None and not self._joining.result().is_closed

    def receive(self, receiver: WeightReceiver, plan: WeightPlan, deadline_s: float) -> Future[Received]:
        def run() -> Received:
            group = self._joining.result()
            try:
                return receiver.receive(group, plan, deadline_s)
            except BaseException:
                group.close()
                raise

        return self._thread.submit(run)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            group = self._group
        if group is not None:
            group.close()
        self._thread.shutdown(wait=False)

    def _join(self, rank: int, deadline_s: float) -> WeightGroup:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # per thread
        group = WeightGroup.join(self.epoch, rank, deadline_s, self._device)
        with self._lock:
            self._group = group
            is_closed = self._is_closed
        if is_closed:
            group.close()
            raise WeightTransferError(f"weight epoch {self.epoch.number} was left")
        return group
