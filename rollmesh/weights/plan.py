"""The plan of a transfer: its tensors and their order. Torch-free, so that the coordinator can use plans.

A `WeightPlan` lists the tensors as the Hugging Face checkpoint names them, and the index of each bucket's first
tensor. Both sides derive the place of every byte from the plan alone, so they only need to agree on the plan's digest.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence

from rollmesh.errors import InvalidArgumentError
from rollmesh.types import TensorSpec, WeightPlan

ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Bytes per element, by torch's name of the type."""


def build_plan(tensors: Sequence[TensorSpec], bucket_bytes: int) -> WeightPlan:
    """Cut the tensors into buckets of at most ``bucket_bytes``; a larger tensor gets a bucket of its own.

    The tensors keep their order: engines load fastest when a layer's tensors are neighbours.

    Raises:
        InvalidArgumentError: there are no tensors, or a type is unknown, a shape is bad, or a name occurs twice.
    """
    _check_tensors(tensors)
    if bucket_bytes < 1:
        raise InvalidArgumentError(f"bucket_bytes is {bucket_bytes}; it must be at least 1", "bucket_bytes")
    starts = [0]
    filled = 0
    for index, tensor in enumerate(tensors):
        size = tensor_num_bytes(tensor)
        if filled and filled + size > bucket_bytes:
            starts.append(index)
            filled = 0
        filled += size
    return WeightPlan(tuple(tensors), tuple(starts), _digest(tensors, starts))


def check_plan(plan: WeightPlan) -> None:
    """Validate a plan that came over the wire.

    Raises:
        InvalidArgumentError: the reasons of `build_plan`, or the buckets do not tile the tensors, or the digest is not
            the plan's.
    """
    _check_tensors(plan.tensors)
    starts = plan.bucket_starts
    is_rising = all(a < b for a, b in itertools.pairwise(starts))
    if not starts or starts[0] != 0 or not is_rising or starts[-1] >= len(plan.tensors):
        raise InvalidArgumentError(
            f"bucket starts must rise from 0 and stay below the number of tensors {len(plan.tensors)}",
            "plan.bucket_starts",
        )
    if plan.digest != _digest(plan.tensors, starts):
        raise InvalidArgumentError("the digest is not that of the tensors and buckets listed", "plan.digest")


class PlanMemory:
    """The receiver's memory of a plan that is sent once: it holds the last plan and finds it by its digest."""

    def __init__(self) -> None:
        self._last: WeightPlan | None = None

    def find(self, plan: WeightPlan | None, digest: bytes) -> WeightPlan | None:
        """Return the plan with this digest, or None if it is not held. A plan that the call carries is remembered."""
        if plan is not None:
            self._last = plan
        return self._last if self._last is not None and self._last.digest == digest else None


def num_buckets(plan: WeightPlan) -> int:
    return len(plan.bucket_starts)


def bucket_tensors(plan: WeightPlan, index: int) -> tuple[TensorSpec, ...]:
    """Return the tensors of one bucket, in order."""
    ends = (*plan.bucket_starts[1:], len(plan.tensors))
    return plan.tensors[plan.bucket_starts[index] : ends[index]]


def bucket_layout(plan: WeightPlan, index: int) -> Iterator[tuple[TensorSpec, int, int]]:
    """Yield each tensor of one bucket with its byte range ``[start, stop)`` in the bucket."""
    start = 0
    for tensor in bucket_tensors(plan, index):
        stop = start + tensor_num_bytes(tensor)
        yield tensor, start, stop
        start = stop


def bucket_num_bytes(plan: WeightPlan, index: int) -> int:
    return sum(tensor_num_bytes(tensor) for tensor in bucket_tensors(plan, index))


def tensor_num_bytes(tensor: TensorSpec) -> int:
    return math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]


def num_bytes(plan: WeightPlan) -> int:
    """Return the number of bytes of the whole transfer."""
    return sum(tensor_num_bytes(tensor) for tensor in plan.tensors)


def transfer_deadline_s(num_bytes: int, fixed_s: float, floor_bandwidth: float) -> float:
    """Return the time that joining and a transfer may take: ``fixed_s + num_bytes / floor_bandwidth``, in seconds.

    Args:
        num_bytes: bytes of the transfer.
        fixed_s: time for joining, in seconds.
        floor_bandwidth: the least bandwidth, in bytes per second.

    >>> transfer_deadline_s(num_bytes=2_000_000_000, fixed_s=30.0, floor_bandwidth=100_000_000.0)
    50.0
    """
    return fixed_s + num_bytes / floor_bandwidth


def _check_tensors(tensors: Sequence[TensorSpec]) -> None:
    if not tensors:
        raise InvalidArgumentError("a plan needs at least one tensor", "plan.tensors")
    names: set[str] = set()
    for index, tensor in enumerate(tensors):
        place = f"plan.tensors[{index}]"
        if not tensor.name or tensor.name in names:
            raise InvalidArgumentError(f"the name {tensor.name!r} is empty or occurs twice", f"{place}.name")
        if tensor.dtype not in ITEM_BYTES:
            known = ", ".join(ITEM_BYTES)
            raise InvalidArgumentError(f"type {tensor.dtype!r} of {tensor.name} is none of {known}", f"{place}.dtype")
        if any(extent < 0 for extent in tensor.shape):
            raise InvalidArgumentError(f"{tensor.name} has shape {tensor.shape}", f"{place}.shape")
        names.add(tensor.name)


def _digest(tensors: Sequence[TensorSpec], starts: Sequence[int]) -> bytes:
    """Return the SHA-256 of the JSON ``[[[name, dtype, [extent, ...]], ...], [start, ...]]``, ASCII without spaces."""
    canonical = [[[t.name, t.dtype, list(t.shape)] for t in tensors], list(starts)]
    return hashlib.sha256(json.dumps(canonical, separators=(",", ":")).encode("ascii")).digest()
