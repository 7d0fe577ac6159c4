"""Conversion between tensors and the flat bytes of a bucket."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from rollmesh.errors import InvalidArgumentError
from rollmesh.types import TensorSpec, WeightPlan
from rollmesh.weights.plan import bucket_layout, bucket_num_bytes


def pack_bucket(
    plan: WeightPlan, index: int, tensors: Mapping[str, torch.Tensor], buffer: torch.Tensor
) -> torch.Tensor:
    """Copy the tensors of bucket ``index`` into ``buffer`` and return the filled slice of the buffer.

    Args:
        plan: the plan of the transfer.
        index: number of the bucket.
        tensors: tensors by name, on any device and with any strides. The mapping may hold tensors of other buckets.
        buffer: uint8 [at least the bucket's bytes], reused from bucket to bucket.

    Raises:
        InvalidArgumentError: a tensor is missing, or its type or shape is not the plan's.
    """
    for spec, start, stop in bucket_layout(plan, index):
        tensor = tensors.get(spec.name)
        if tensor is None:
            raise InvalidArgumentError(f"the plan lists {spec.name}, which was not given", "tensors")
        _check(spec, tensor)
        slot = buffer[start:stop]
        if _is_aligned(slot, tensor.element_size()):
            slot.view(tensor.dtype).view(spec.shape).copy_(tensor)
        else:
            slot.copy_(tensor.contiguous().view(-1).view(torch.uint8))
    return buffer[: bucket_num_bytes(plan, index)]


def unpack_bucket(plan: WeightPlan, index: int, bucket: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of bucket ``index`` by name: views of ``bucket`` (uint8 [its bytes]) where alignment allows."""
    for spec, start, stop in bucket_layout(plan, index):
        dtype = getattr(torch, spec.dtype)
        slot = bucket[start:stop]
        if not _is_aligned(slot, dtype.itemsize):
            slot = slot.clone()
        yield spec.name, slot.view(dtype).view(spec.shape)


def _is_aligned(slot: torch.Tensor, item_bytes: int) -> bool:
    return slot.storage_offset() % item_bytes == 0


def _check(spec: TensorSpec, tensor: torch.Tensor) -> None:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
        raise InvalidArgumentError(
            f"{spec.name} is {dtype} {tuple(tensor.shape)}, but the plan says {spec.dtype} {spec.shape}", "tensors"
        )
