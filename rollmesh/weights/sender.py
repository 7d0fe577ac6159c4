"""The learner's side of a transfer."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

from rollmesh.errors import DeadlineError, WeightTransferError
from rollmesh.types import WeightPlan
from rollmesh.weights.digest import TransferDigest
from rollmesh.weights.group import WeightGroup
from rollmesh.weights.plan import bucket_num_bytes, num_buckets


def send(group: WeightGroup, plan: WeightPlan, buckets: Iterable[torch.Tensor], deadline_s: float) -> bytes:
    """Broadcast every bucket in order, and hash each bucket while it travels.

    Args:
        group: the members of the transfer.
        plan: the plan of the transfer.
        buckets: uint8 [bytes of the bucket] each, on the group's device. The next bucket is asked for after the
            previous bucket has been sent, so one buffer may serve all buckets.
        deadline_s: time for the whole transfer, with the time that the iterable takes.

    Returns:
        The digest of the bytes sent.

    Raises:
        DeadlineError: the transfer did not end in time.
        WeightTransferError: a member is gone, or the buckets are not those of the plan.
    """
    deadline = time.monotonic() + deadline_s
    digest = TransferDigest()
    index = 0
    for bucket in buckets:
        _check_bucket(plan, index, bucket)
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            raise DeadlineError(f"sending took over {deadline_s:.1f} s: bucket {index} of {num_buckets(plan)}")
        broadcast = group.start_broadcast(bucket, remaining_s)
        digest.add(bucket_bytes(bucket))
        broadcast.wait()
        index += 1
    if index != num_buckets(plan):
        raise WeightTransferError(f"{index} buckets were given, the plan has {num_buckets(plan)}")
    return digest.digest()


def bucket_bytes(bucket: torch.Tensor) -> memoryview:
    """Return the bytes of a uint8 bucket: the bucket's own memory on the CPU, a copy on other devices."""
    return bucket.cpu().numpy().data


def _check_bucket(plan: WeightPlan, index: int, bucket: torch.Tensor) -> None:
    if index >= num_buckets(plan):
        raise WeightTransferError(f"more buckets were given than the {num_buckets(plan)} of the plan")
    expected = bucket_num_bytes(plan, index)
    if bucket.dtype != torch.uint8 or tuple(bucket.shape) != (expected,) or not bucket.is_contiguous():
        raise WeightTransferError(
            f"bucket {index} is {bucket.dtype} {tuple(bucket.shape)}; the plan says {expected} bytes in one piece"
        )
