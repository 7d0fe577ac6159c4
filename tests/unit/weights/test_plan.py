"""What is sent in which order."""

from __future__ import annotations

import doctest
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollmesh.errors import InvalidArgumentError
from rollmesh.types import TensorSpec, WeightPlan
from rollmesh.weights import plan as plan_module
from rollmesh.weights.plan import (
    ITEM_BYTES,
    PlanMemory,
    bucket_layout,
    bucket_num_bytes,
    bucket_tensors,
    build_plan,
    check_plan,
    num_buckets,
    num_bytes,
    tensor_num_bytes,
    transfer_deadline_s,
)

shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
dtypes = st.sampled_from(sorted(ITEM_BYTES))
tensor_lists = st.lists(st.tuples(dtypes, shapes), min_size=1, max_size=30).map(
    lambda rows: [TensorSpec(f"layer.{i}.weight", dtype, shape) for i, (dtype, shape) in enumerate(rows)]
)

THREE = (TensorSpec("a", "float32", (4, 4)), TensorSpec("b", "bfloat16", (8,)), TensorSpec("c", "float32", ()))


@settings(deadline=None)
@given(tensor_lists, st.integers(1, 3000))
def test_buckets_tile_the_tensors_in_their_order(tensors: list[TensorSpec], bucket_bytes: int) -> None:
    plan = build_plan(tensors, bucket_bytes)
    rebuilt = [tensor for index in range(num_buckets(plan)) for tensor in bucket_tensors(plan, index)]
    assert rebuilt == tensors
    assert sum(bucket_num_bytes(plan, index) for index in range(num_buckets(plan))) == num_bytes(plan)
    check_plan(plan)


@settings(deadline=None)
@given(tensor_lists, st.integers(1, 3000))
def test_a_bucket_exceeds_its_size_only_for_a_single_large_tensor(tensors: list[TensorSpec], bucket_bytes: int) -> None:
    plan = build_plan(tensors, bucket_bytes)
    for index in range(num_buckets(plan)):
        sizes = [tensor_num_bytes(tensor) for tensor in bucket_tensors(plan, index)]
        assert sum(sizes) <= bucket_bytes or len([size for size in sizes if size]) == 1


def test_the_layout_leaves_no_gap_between_tensors() -> None:
    plan = build_plan(THREE, 1000)
    assert [(spec.name, start, stop) for spec, start, stop in bucket_layout(plan, 0)] == [
        ("a", 0, 64),
        ("b", 64, 80),
        ("c", 80, 84),
    ]


def test_the_digest_is_that_of_the_canonical_text_and_never_changes() -> None:
    # Other languages compute it from `[[["a","float32",[2]]],[0]]`.
    plan = build_plan([TensorSpec("a", "float32", (2,))], 100)
    assert plan.digest.hex() == "2fb1a2af9cda0e1d379f4cf7b0fc87779f919c601f1212f2415bf01d8c7c5baf"


@pytest.mark.parametrize(
    "other",
    [
        (replace(THREE[0], name="x"), *THREE[1:]),
        (replace(THREE[0], dtype="int32"), *THREE[1:]),
        (replace(THREE[0], shape=(16,)), *THREE[1:]),
        (THREE[1], THREE[0], THREE[2]),
    ],
)
def test_the_digest_tells_names_types_shapes_and_order_apart(other: tuple[TensorSpec, ...]) -> None:
    assert build_plan(other, 1000).digest != build_plan(THREE, 1000).digest


def test_the_digest_tells_bucket_borders_apart() -> None:
    assert build_plan(THREE, 64).digest != build_plan(THREE, 1000).digest


@pytest.mark.parametrize(
    ("plan", "field"),
    [
        (WeightPlan((), (0,), b""), "plan.tensors"),
        (replace(build_plan(THREE, 64), bucket_starts=()), "plan.bucket_starts"),
        (replace(build_plan(THREE, 64), bucket_starts=(1, 2)), "plan.bucket_starts"),
        (replace(build_plan(THREE, 64), bucket_starts=(0, 2, 2)), "plan.bucket_starts"),
        (replace(build_plan(THREE, 64), bucket_starts=(0, 3)), "plan.bucket_starts"),
        (replace(build_plan(THREE, 64), digest=b"x" * 32), "plan.digest"),
        (replace(build_plan(THREE, 64), tensors=(THREE[0], THREE[0])), "plan.tensors[1].name"),
        (replace(build_plan(THREE, 64), tensors=(replace(THREE[0], dtype="complex64"),)), "plan.tensors[0].dtype"),
        (replace(build_plan(THREE, 64), tensors=(replace(THREE[0], shape=(-1, 4)),)), "plan.tensors[0].shape"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_naming_the_field(plan: WeightPlan, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check_plan(plan)
    assert caught.value.field == field


def test_a_transfer_may_take_its_fixed_time_and_its_bytes_at_floor_bandwidth() -> None:
    assert transfer_deadline_s(40_000_000, fixed_s=30, floor_bandwidth=20e6) == 32


def test_plan_and_digest_need_no_torch() -> None:
    code = "import sys, rollmesh.weights.plan, rollmesh.weights.digest; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_last_plan_is_found_by_its_digest_and_no_other() -> None:
    first, second = build_plan(THREE, 100), build_plan(THREE, 1)
    memory = PlanMemory()
    assert memory.find(None, first.digest) is None
    assert memory.find(first, first.digest) is first
    assert memory.find(None, first.digest) is first
    assert memory.find(second, second.digest) is second
    assert memory.find(None, first.digest) is None


def test_the_worked_example_of_the_deadline_is_right() -> None:
    found = doctest.testmod(plan_module)
    assert found.attempted > 0
    assert found.failed == 0
