"""A moving average of the policy: ``θ_avg ← β θ_avg + (1 - β) θ`` once per optimiser step.

The average lies in main memory, in float32. Each rank keeps some of the tensors, each of them whole. The engine gives
the policy's tensors, so the average is right under every ZeRO stage. At stage 3 the engine gathers the parameters
bucket by bucket. At the lower stages each rank copies its tensors once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rollmesh.errors import ConfigError
from rollmesh.types import TensorSpec
from rollmesh.weights.plan import bucket_tensors, build_plan, num_buckets, tensor_num_bytes
from services.learner.batching import balance
from services.learner.engine import PolicyEngine
from services.learner.host_copy import PendingFile, copy_to_host
from services.learner.ranks import Ranks

BUCKET_BYTES = 2**28
"""Largest number of bytes of parameters that stage 3 gathers at one time; a larger parameter is gathered alone."""


class PolicyAverage:
    """The moving average of the policy's weights. Every rank has one part, and all ranks call the same method together.

    Args:
        engine: the policy; the average starts from its present weights.
        ranks: the process group.
        beta: β, the weight of the old average, between 0 and 1. With β = 0.9, a weight 1.0 whose average is 0.5 gives
            the average 0.9 · 0.5 + 0.1 · 1.0 = 0.55.
    """

    def __init__(self, engine: PolicyEngine, ranks: Ranks, beta: float) -> None:
        self._engine = engine
        self._ranks = ranks
        self._beta = beta
        self._plan = build_plan(engine.tensor_specs(), BUCKET_BYTES)
        self._owners = deal(self._plan.tensors, ranks.world_size)
        self._average = {name: tensor.to("cpu", torch.float32, copy=True) for name, tensor in self._current()}

    def _current(self) -> Iterator[tuple[str, Tensor]]:
        """Yield this rank's tensors of the present policy. Each is valid until the next is asked for."""
        for index in range(num_buckets(self._plan)):
            names = [spec.name for spec in bucket_tensors(self._plan, index)]
            with self._engine.whole(names) as tensors:
                yield from ((name, tensors[name]) for name in names if self._owners[name] == self._ranks.rank)

    def update(self) -> None:
        """Update the average after an optimiser step. Collective at stage 3."""
        for name, tensor in self._current():
            self._average[name].lerp_(tensor.cpu().float(), 1 - self._beta)  # copied in the policy's dtype: fewer bytes

    def copy_state(self, folder: Path) -> list[PendingFile]:
        """Copy this rank's tensors to a file that is to be written in ``folder``, which has to exist."""
        average = copy_to_host(self._average)
        return [PendingFile(self._file(folder), lambda path: save_file(average, path))]

    def load(self, folder: Path) -> None:
        """Read the file that `copy_state` returned, with the same number of ranks.

        Raises:
            ConfigError: this rank's file is missing, cannot be read, or holds the average of another model.
        """
        path = self._file(folder)
        fix = "name another checkpoint"
        try:
            stored = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ConfigError(str(path), "holds no average of the policy", fix) from error
        if {n: t.shape for n, t in stored.items()} != {n: t.shape for n, t in self._average.items()}:
            raise ConfigError(str(path), "holds the average of another model", fix)
        for name, tensor in stored.items():
            self._average[name].copy_(tensor)

    def copy_weights(self) -> dict[str, Tensor]:
        """Return a copy of the whole average in the policy's dtype in main memory, by name. Collective.

        On ranks other than 0 the dict is empty.
        """
        weights = {}
        for spec in self._plan.tensors:
            tensor = self._fetch(spec)
            if self._ranks.is_first:
                weights[spec.name] = tensor.to("cpu", copy=True)
        return weights

    def _fetch(self, spec: TensorSpec) -> Tensor:
        """Return a tensor of the average in the policy's dtype, on every rank. Collective."""
        dtype, owner = getattr(torch, spec.dtype), self._owners[spec.name]
        if owner == self._ranks.rank:
            tensor = self._average[spec.name].to(dtype)
        else:
            tensor = torch.empty(spec.shape, dtype=dtype)
        if self._ranks.world_size == 1:
            return tensor
        moved = tensor.to(self._ranks.device)
        dist.broadcast(moved, src=owner)
        return moved

    def _file(self, folder: Path) -> Path:
        return folder / f"rank-{self._ranks.rank:05d}.safetensors"


def deal(tensors: Sequence[TensorSpec], num_ranks: int) -> dict[str, int]:
    """Return the rank of each tensor, by name, so that all ranks have nearly equal numbers of bytes.

    Every rank computes the same result.
    """
    ordered = sorted(tensors, key=lambda spec: spec.name)
    shares = balance([tensor_num_bytes(spec) for spec in ordered], num_ranks)
    return {ordered[index].name: rank for rank, share in enumerate(shares) for index in share}
