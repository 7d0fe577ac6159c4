"""Between tensors and the flat bytes of a bucket."""

from __future__ import annotations

import pytest
import torch

from rollmesh.errors import InvalidArgumentError
from rollmesh.types import TensorSpec
from rollmesh.weights.buckets import pack_bucket, unpack_bucket
from rollmesh.weights.plan import bucket_num_bytes, build_plan, num_buckets

TENSORS = {
    "odd": torch.arange(3, dtype=torch.uint8),
    "misaligned": torch.randn(2, 3),
    "half": torch.randn(5, dtype=torch.bfloat16),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.zeros(0, 4),
    "transposed": torch.randn(4, 2).t(),
}
SPECS = [TensorSpec(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in TENSORS.items()]


@pytest.mark.parametrize("bucket_bytes", [1, 20, 10_000])
def test_tensors_come_back_bit_for_bit_whatever_their_alignment(bucket_bytes: int) -> None:
    plan = build_plan(SPECS, bucket_bytes)
    buffer = torch.empty(200, dtype=torch.uint8)
    seen = {}
    for index in range(num_buckets(plan)):
        bucket = pack_bucket(plan, index, TENSORS, buffer).clone()
        assert bucket.numel() == bucket_num_bytes(plan, index)
        seen.update(unpack_bucket(plan, index, bucket))
    assert list(seen) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert seen[name].dtype == tensor.dtype
        assert torch.equal(seen[name], tensor), name


def test_unpacked_tensors_are_views_where_alignment_allows() -> None:
    plan = build_plan([TensorSpec("w", "float32", (2, 2))], 100)
    bucket = torch.zeros(16, dtype=torch.uint8)
    ((_, tensor),) = unpack_bucket(plan, 0, bucket)
    bucket.fill_(255)
    assert torch.isnan(tensor).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "lists w"),
        ({"w": torch.zeros(4)}, "float32 \\(4,\\)"),
        ({"w": torch.zeros(2, 2, dtype=torch.float64)}, "float64"),
    ],
)
def test_a_tensor_that_is_not_the_plans_is_refused(given: dict[str, torch.Tensor], message: str) -> None:
    plan = build_plan([TensorSpec("w", "float32", (2, 2))], 100)
    with pytest.raises(InvalidArgumentError, match=message):
        pack_bucket(plan, 0, given, torch.empty(16, dtype=torch.uint8))
