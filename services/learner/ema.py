"""A moving average of the policy: ``θ_avg ← β θ_avg + (1 - β) θ`` once per optimiser step.

It is kept in float32 in main memory, each rank having some of the tensors whole. They are read through the engine, so
it is right under every ZeRO stage; at stage 3 that gathers the parameters bucket by bucket, below it costs one copy.
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
from services.learner.ranks import Ranks

BUCKET_BYTES = 2**28
"""Parameters that stage 3 gathers at one time."""


class PolicyAverage:
    """The average of a policy in training. All ranks have one and call it together.

    Args:
        engine: the policy; the average starts from what it holds now.
        ranks: the process group.
        beta: the old average's share, between 0 and 1.
    """

    def __init__(self, engine: PolicyEngine, ranks: Ranks, beta: float) -> None:
        self._engine = engine
        self._ranks = ranks
        self._beta = beta
        self._plan = build_plan(engine.tensor_specs(), BUCKET_BYTES)
        self._owners = deal(self._plan.tensors, ranks.world_size)
        self._average = {name: tensor.to("cpu", torch.float32, copy=True) for name, tensor in self._current()}

    def _current(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's tensors as they are in the policy; each is valid until the next is asked for."""
        for index in range(num_buckets(self._plan)):
            names = [spec.name for spec in bucket_tensors(self._plan, index)]
            with self._engine.whole(names) as tensors:
                yield from ((name, tensors[name]) for name in names if self._owners[name] == self._ranks.rank)

    def update(self) -> None:
        """Take in the policy after an optimiser step. Collective at stage 3."""
        for name, tensor in self._current():
            self._average[name].lerp_(tensor.cpu().float(), 1 - self._beta)  # converted here: half the bytes to move

    def save(self, folder: Path) -> None:
        """Write this rank's tensors into a folder that is there."""
        save_file(self._average, self._file(folder))

    def load(self, folder: Path) -> None:
        """Read what `save` wrote with as many ranks.

        Raises:
            ConfigError: it is not there, or of another model.
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

    def export(self, folder: Path) -> None:
        """Write a Hugging Face folder of the average in the policy's dtype: rank 0 does, gathering. Collective."""
        state = {}
        for spec in self._plan.tensors:
            tensor = self._fetch(spec)
            if self._ranks.is_first:
                state[spec.name] = tensor.cpu()
        if self._ranks.is_first:
            self._engine.write_pretrained(folder, state)
        self._ranks.barrier()

    def _fetch(self, spec: TensorSpec) -> Tensor:
        """A tensor of the average in the policy's dtype, from the rank that has it, on all."""
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
    """Which rank has which tensor, so that all have about as many bytes. The same on every rank."""
    ordered = sorted(tensors, key=lambda spec: spec.name)
    shares = balance([tensor_num_bytes(spec) for spec in ordered], num_ranks)
    return {ordered[index].name: rank for rank, share in enumerate(shares) for index in share}
