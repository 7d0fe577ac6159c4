"""The learner's data-parallel processes: the start of their process group, and small collectives for a step."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from rollmesh.errors import DeadlineError, WeightTransferError
from rollmesh.weights.group import RendezvousStore
from services.learner.config import LearnerSection

MEETING_TIMEOUT_S = 300.0
"""Time in which all ranks have to meet at the start; they are started together."""
PROTOCOL_MARGIN_S = 600.0
"""Time added to the timeout of the collectives, for one publish with its retries and one checkpoint on rank 0."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's place among the learner's processes, and their default process group.

    Attributes:
        rank: the number of this process, from 0. Only rank 0 speaks to the rest of the mesh.
        world_size: the number of processes.
        device: the device on which this process computes.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @classmethod
    def start(cls, section: LearnerSection) -> Ranks:
        """Join the default process group, and return this process's place in the group.

        A single process makes a group of its own, and opens no port. The timeout of the collectives is long, because
        the other ranks wait in a collective while rank 0 waits for a batch.

        Raises:
            DeadlineError: some ranks did not come within `MEETING_TIMEOUT_S`.
        """
        for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
            os.environ.setdefault(name, alone)  # DeepSpeed reads them too
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        device = resolve_device(section.device, int(os.environ["LOCAL_RANK"]))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(section.num_threads)
        timeout = timedelta(seconds=2 * section.batch_timeout_s + PROTOCOL_MARGIN_S)
        if not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            if world_size == 1:
                store: Store = dist.HashStore()  # type: ignore[attr-defined]
                dist.init_process_group(backend, rank=0, world_size=1, store=store, timeout=timeout)
            elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # the user's launcher hosts the store
                dist.init_process_group(backend, timeout=timeout)
            else:
                store = meeting_store(rank, world_size)
                store.set_timeout(timeout)
                dist.init_process_group(backend, rank=rank, world_size=world_size, store=store, timeout=timeout)
        return cls(rank=rank, world_size=world_size, device=device)

    def is_lost_peer(self, error: BaseException) -> bool:
        """Return whether ``error`` says that a collective failed because another rank is gone or does not answer.

        Gloo raises bare RuntimeErrors, which begin with the place in Gloo's code.
        """
        if self.world_size == 1:
            return False
        return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))

    def stop(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def broadcast_bytes(self, data: bytes | None) -> bytes:
        """Return rank 0's ``data`` on every rank. The other ranks pass None. Collective."""
        if self.world_size == 1:
            assert data is not None
            return data
        size = torch.tensor([len(data) if data is not None else 0], dtype=torch.int64, device=self.device)
        dist.broadcast(size, src=0)
        if data is not None:
            buffer = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8).to(self.device)
        else:
            buffer = torch.empty(max(1, int(size)), dtype=torch.uint8, device=self.device)
        dist.broadcast(buffer, src=0)
        return buffer.cpu().numpy().tobytes()[: int(size)]

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Return the ``data`` of all ranks, in the order of the ranks, on every rank. Collective."""
        if self.world_size == 1:
            return [data]
        lengths = [0] * self.world_size
        lengths[self.rank] = len(data)
        lengths = [int(length) for length in self.sum(lengths)]
        padded = torch.zeros(max(1, *lengths), dtype=torch.uint8, device=self.device)
        if data:
            padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device)
        gathered = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(gathered, padded)
        return [part.cpu().numpy().tobytes()[:length] for part, length in zip(gathered, lengths, strict=True)]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the element-wise sum over all ranks, in float64. Collective."""
        return self._reduce(torch.tensor(values, dtype=torch.float64, device=self.device), dist.ReduceOp.SUM).tolist()

    def max(self, values: Sequence[float]) -> list[float]:
        """Return the element-wise maximum over all ranks, in float64. Collective."""
        return self._reduce(torch.tensor(values, dtype=torch.float64, device=self.device), dist.ReduceOp.MAX).tolist()

    def sum_tensor(self, values: torch.Tensor) -> torch.Tensor:
        """Replace ``values`` by the element-wise sum over all ranks, and return them. Collective."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max_tensor(self, values: torch.Tensor) -> torch.Tensor:
        """Replace ``values`` by the element-wise maximum over all ranks, and return them. Collective."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def barrier(self) -> None:
        """Wait until all ranks have come here. Collective."""
        if self.world_size > 1:
            dist.barrier()

    def _reduce(self, values: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> torch.Tensor:
        if self.world_size > 1:
            dist.all_reduce(values, operation)
        return values


def meeting_store(rank: int, world_size: int, timeout_s: float = MEETING_TIMEOUT_S) -> Store:
    """Return the store in which the ranks meet, once all ranks have come.

    Rank 0 hosts the store and listens on MASTER_ADDR alone. A store of torch would listen on every interface.

    Args:
        rank: this process's rank.
        world_size: the number of ranks.
        timeout_s: the longest time to wait for the other ranks.

    Raises:
        DeadlineError: some ranks did not come in time. The error names the missing ranks.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    missing: list[int] = [0]
    try:
        if rank == 0:
            store = RendezvousStore.host(host, port, place="MASTER_PORT").store
        else:
            store = RendezvousStore.connect(host, port, timeout_s).store
        store.set(_here(rank), "")
        try:
            store.wait([_here(each) for each in range(world_size)], timedelta(seconds=timeout_s))
        except dist.DistError:
            missing = [each for each in range(world_size) if not store.check([_here(each)])]
            raise
    except (dist.DistError, WeightTransferError) as error:
        raise DeadlineError(
            f"rank {rank} of the learner's {world_size} waited {timeout_s:g} s at {host}:{port} for rank "
            f"{', '.join(map(str, missing))}; are all of them started, with the same WORLD_SIZE and MASTER_ADDR?"
        ) from error
    return store


def _here(rank: int) -> str:
    """Return the key that a rank sets when it has come."""
    return f"here/{rank}"


def leave(exit_code: int) -> NoReturn:
    """End the process at once, after all output is written.

    Call this when all parts of the learner are closed. The teardown of the threads of torch and DeepSpeed is skipped,
    because it sometimes aborts a process that has done all its work.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def resolve_device(name: str, local_rank: int) -> torch.device:
    """Return the device for the setting "auto", "cpu" or "cuda". "auto" is CUDA where torch finds a CUDA device."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", local_rank)
