"""The learner's end of the weight protocol for tests of engines, which publishes state dicts to one engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from rollmesh.types import CommitReport, PolicyVersion, ReceiveReport, TensorSpec, WeightEpoch
from rollmesh.weights.buckets import pack_bucket
from rollmesh.weights.digest import TransferDigest
from rollmesh.weights.group import RendezvousStore, WeightGroup
from rollmesh.weights.plan import bucket_num_bytes, build_plan, num_buckets
from rollmesh.weights.sender import bucket_bytes, send
from services.rollout.engine import Engine

StateDict = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Transfer:
    """The digest of the sent weights, and the engine's report of the received weights."""

    digest: bytes
    report: ReceiveReport


class Publisher:
    """The sender of one model's weights to one engine.

    Args:
        engine: the engine.
        weights: any weights of the model, by their names in the checkpoint.
        bucket_bytes: the largest size of a bucket.
    """

    def __init__(self, engine: Engine, weights: StateDict, bucket_bytes: int = 100_000) -> None:
        self._engine = engine
        specs = [TensorSpec(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in weights.items()]
        self.plan = build_plan(specs, bucket_bytes)
        self._store = RendezvousStore.host("127.0.0.1", 0)
        self.epoch = WeightEpoch(1, "127.0.0.1", self._store.port, 1 + engine.num_weight_ranks)
        self._group: WeightGroup | None = None

    async def publish(self, version: PolicyVersion, weights: StateDict) -> CommitReport:
        """Make a whole publish: prepare, receive, verify, commit."""
        transfer = await self.transfer(version, weights)
        assert set(transfer.report.digests) == {transfer.digest}
        return await self._engine.commit(version)

    async def transfer(
        self,
        version: PolicyVersion,
        weights: StateDict,
        *,
        flip_byte: bool = False,
        before_bucket: Callable[[], None] = lambda: None,
    ) -> Transfer:
        """Make the first part of a publish: prepare and receive.

        Args:
            version: the version of the weights.
            weights: the weights, by their names in the checkpoint.
            flip_byte: send one wrong byte in the last bucket.
            before_bucket: called before each bucket, in the thread that sends.
        """
        await self._engine.prepare(self.plan, self.epoch, 1, 30.0)
        receiving = asyncio.create_task(self._engine.receive(version))
        digest = TransferDigest()

        def buckets() -> Iterator[torch.Tensor]:
            buffer = torch.empty(
                max(bucket_num_bytes(self.plan, i) for i in range(num_buckets(self.plan))), dtype=torch.uint8
            )
            for index in range(num_buckets(self.plan)):
                before_bucket()
                bucket = pack_bucket(self.plan, index, weights, buffer)
                digest.add(bucket_bytes(bucket))
                if flip_byte and index == num_buckets(self.plan) - 1:
                    bucket[bucket.numel() // 2] ^= 1
                yield bucket

        await asyncio.to_thread(self._send, buckets())
        return Transfer(digest.digest(), await receiving)

    def leave(self) -> None:
        """Leave the broadcast group, as every member does after an abort."""
        if self._group is not None:
            self._group.close()
            self._group = None

    def _send(self, buckets: Iterator[torch.Tensor]) -> None:
        if self._group is None:
            self._group = WeightGroup.join(self.epoch, 0, 30.0)
        send(self._group, self.plan, buckets, 30.0)
