"""The process group that carries weights: rank 0 is the learner, the other ranks are engine processes.

One group is one weight epoch. The process may have other groups for other purposes; the weight group is never their
default. The group uses Gloo where tensors are on the CPU, and NCCL where tensors are on a GPU; the code is the same.

After an aborted publish every member closes its group, even a member whose own broadcasts succeeded. A broadcast that
failed on one rank may have succeeded on another rank, and the next broadcast would then pair operations of different
broadcasts. The members can join the same epoch again: the store counts how often each rank has joined, and members with
the same count meet.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from rollmesh.errors import ConfigError, DeadlineError, WeightTransferError
from rollmesh.types import WeightEpoch
from rollmesh.weights.interface import address_towards

_FIRST_POLL_S = 0.0002
_LAST_POLL_S = 0.005
# The backend's timeout is this much longer than the caller's deadline. So a late broadcast ends by the deadline, and
# never by the backend's timeout, whose error looks like that of a broken peer.
_BACKEND_GRACE_S = 1.0
_BACKLOG = 1024
"""Members that may be connecting to the store at the same moment."""


class RendezvousStore:
    """The key-value store through which the members of a weight epoch find each other. The learner hosts it.

    Attributes:
        address: the address under which the members reach the store.
        port: the port that the store listens on.
    """

    def __init__(self, store: TCPStore, address: str) -> None:
        self.store = store
        self.address = address
        self.port = int(store.port)

    @classmethod
    def host(cls, host: str, port: int = 0, place: str = "weights.store_port") -> RendezvousStore:
        """Listen on one address; port 0 takes a free port. The store lives as long as the object.

        The socket is bound here, because torch's store would listen on every interface, whatever ``host`` is.

        Args:
            host: the address to listen on.
            port: the port to listen on.
            place: the setting that an error names.

        Raises:
            ConfigError: the address cannot be used.
        """
        try:
            listener = _listen(host, port)
            store = TCPStore(
                host,
                listener.getsockname()[1],
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=10),
                master_listen_fd=listener.detach(),  # torch closes it
            )
        except (OSError, dist.DistError, RuntimeError) as error:
            problem = f"{host}:{port} cannot be listened on ({_first_line(error)})"
            raise ConfigError(place, problem, "choose another") from error
        return cls(store, host)

    @classmethod
    def connect(cls, host: str, port: int, timeout_s: float) -> RendezvousStore:
        """Reach the learner's store.

        Raises:
            WeightTransferError: the store does not answer within ``timeout_s``.
        """
        timeout = timedelta(seconds=timeout_s)
        try:
            store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
        except (dist.DistError, RuntimeError) as error:
            raise WeightTransferError(f"the store at {host}:{port} cannot be reached: {_first_line(error)}") from error
        return cls(store, host)


class Broadcast:
    """A broadcast that has begun. `wait` completes the broadcast."""

    def __init__(self, group: WeightGroup, work: Any, tensor: torch.Tensor, timeout_s: float) -> None:
        self._group = group
        self._work = work
        self._tensor = tensor  # keeps the memory alive while the transport writes into it
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s

    def wait(self) -> None:
        """Block until the bytes have arrived, the deadline passes, or another thread closes the group.

        Raises:
            DeadlineError: the broadcast did not end in time.
            WeightTransferError: a peer is gone, or the group was closed.
        """
        # No backend has a wait with a deadline that `abort` interrupts: Gloo's wait ignores abort, and NCCL's wait only
        # blocks the stream. So poll, with growing pauses.
        pause_s = _FIRST_POLL_S
        while not self._work.is_completed():
            if self._group.is_closed:
                raise WeightTransferError("the weight group was closed during a broadcast")
            if time.monotonic() > self._deadline:
                raise self._late()
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LAST_POLL_S)
        try:
            self._work.wait()
        except RuntimeError as error:
            if time.monotonic() > self._deadline:
                raise self._late() from error
            raise WeightTransferError(f"a broadcast failed: {_first_line(error)}") from error
        self._group.finish(self)

    def _late(self) -> DeadlineError:
        return DeadlineError(f"a broadcast of {self._tensor.nbytes} bytes took over {self._timeout_s:.1f} s")


class WeightGroup:
    """One member of a weight epoch. One thread broadcasts one tensor at a time; any thread may call `close`."""

    def __init__(self, group: Any, epoch: WeightEpoch, rank: int) -> None:
        self._group = group
        self._pending: Broadcast | None = None
        self._is_closed = threading.Event()
        self._lock = threading.Lock()
        """A broadcast begins before the group closes, and then `close` aborts the broadcast; or it does not begin."""
        self.epoch = epoch
        self.rank = rank

    @classmethod
    def join(cls, epoch: WeightEpoch, rank: int, timeout_s: float, device: torch.device | str = "cpu") -> WeightGroup:
        """Join the other members of the epoch; blocks until all members have joined.

        Args:
            epoch: the epoch, with the address of its store.
            rank: this member's rank.
            timeout_s: time for all members to join.
            device: device of the tensors to be broadcast; decides between Gloo and NCCL.

        Raises:
            DeadlineError: not all members joined within ``timeout_s``.
            WeightTransferError: the store or a member cannot be reached.
        """
        device = torch.device(device)
        deadline = time.monotonic() + timeout_s
        timeout = timedelta(seconds=timeout_s)
        store = RendezvousStore.connect(epoch.store_host, epoch.store_port, timeout_s).store
        try:
            store.set_timeout(timeout)
            attempt = store.add(f"epoch-{epoch.number}/joined/{rank}", 1)
            prefixed = PrefixStore(f"epoch-{epoch.number}/{attempt}", store)
            if device.type == "cuda":
                backend = _nccl(prefixed, rank, epoch.world_size, timeout)
            else:
                backend = _gloo(prefixed, rank, epoch.world_size, timeout, address_towards(epoch.store_host))
        except ConfigError as error:
            raise WeightTransferError(str(error)) from error
        except (dist.DistError, RuntimeError) as error:
            if time.monotonic() >= deadline - 0.1 or "timeout" in str(error).lower():
                raise DeadlineError(
                    f"not all {epoch.world_size} members of weight epoch {epoch.number} joined in {timeout_s:.1f} s"
                ) from error
            raise WeightTransferError(f"weight epoch {epoch.number}: {_first_line(error)}") from error
        group = cls(backend, epoch, rank)
        try:
            # NCCL connects at the first collective. Run it here, within the deadline of joining.
            group.broadcast(torch.zeros(1, dtype=torch.uint8, device=device), max(0.1, deadline - time.monotonic()))
        except (DeadlineError, WeightTransferError):
            group.close()
            raise
        return group

    @property
    def is_closed(self) -> bool:
        return self._is_closed.is_set()

    def broadcast(self, tensor: torch.Tensor, timeout_s: float) -> None:
        """Send (rank 0) or receive (others) one tensor. Raises as `Broadcast.wait`."""
        self.start_broadcast(tensor, timeout_s).wait()

    def start_broadcast(self, tensor: torch.Tensor, timeout_s: float) -> Broadcast:
        """Begin to send (rank 0) or receive (others). The tensor must not change until `Broadcast.wait` has returned.

        Raises:
            WeightTransferError: the group is closed.
        """
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.timeout = timedelta(seconds=max(timeout_s, 0) + _BACKEND_GRACE_S)
        with self._lock:
            if self.is_closed:
                raise WeightTransferError("the weight group is closed")
            assert self._pending is None, "one broadcast at a time"
            try:
                work = self._group.broadcast([tensor], options)
            except RuntimeError as error:
                raise WeightTransferError(f"a broadcast could not start: {_first_line(error)}") from error
            self._pending = Broadcast(self, work, tensor, timeout_s)
            return self._pending

    def finish(self, broadcast: Broadcast) -> None:
        """Record that a broadcast has succeeded, so that the next broadcast may begin. `Broadcast.wait` calls this."""
        with self._lock:
            if not self.is_closed:
                assert self._pending is broadcast
                self._pending = None

    def close(self) -> None:
        """Leave the group at once, without waiting for the peers. A thread in `Broadcast.wait` gets an error."""
        with self._lock:
            if self._is_closed.is_set():
                return
            self._is_closed.set()
            group, pending = self._group, self._pending
            self._group = None
        if pending is None:
            group.shutdown()
            return
        group.abort()
        # Gloo's destructor waits until a pending operation times out, so the destructor runs in a thread of its own.
        threading.Thread(target=_let_go, args=([group, pending],), name="weight-group-end", daemon=True).start()


def _let_go(owned: list[Any]) -> None:
    """Drop the last references to a broken group, in a thread that no other thread joins."""
    time.sleep(2 * _LAST_POLL_S)
    owned.clear()


def _gloo(store: Store, rank: int, world_size: int, timeout: timedelta, address: str) -> Any:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, world_size, options)


def _nccl(store: Store, rank: int, world_size: int, timeout: timedelta) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    with _surviving_nccl_errors():
        return dist.ProcessGroupNCCL(store, rank, world_size, options)


@contextmanager
def _surviving_nccl_errors() -> Iterator[None]:
    """Let NCCL's watchdog abort the communicator on a timeout (2); the default ends the process.

    A group reads the variable when it is made, so the other groups of the process keep their setting.
    """
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    before = os.environ.get(name)
    os.environ[name] = "2"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _listen(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
