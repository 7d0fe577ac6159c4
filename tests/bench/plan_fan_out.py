"""What announcing a version costs the coordinator's event loop: a plan written for each worker, or once and then named.

The first way makes the message of every worker from the plan's tensors, at every version. Ours encodes the plan once in
the run, beside the event loop, appends its bytes to the first message of each worker, and names it by its digest from
the second version on. Both end with the bytes that gRPC sends. The plan is that of a mixture of experts. The first way
is measured on a few workers, so that it ends soon, and its time is scaled up by the number of workers.
"""

from __future__ import annotations

from rollmesh.types import PolicyVersion, TensorSpec, WeightEpoch, WeightPlan
from rollmesh.weights.plan import build_plan
from rollmesh.wire.weights import (
    EncodedPlan,
    PrepareWeightsCall,
    encode_plan,
    prepare_to_bytes,
    prepare_to_proto,
)
from tests.bench.figures import Figure, median, timed

NUM_TENSORS = 46_000
NUM_WORKERS = 64
WRITTEN_WORKERS = 8
EPOCH = WeightEpoch(1, "10.0.0.1", 29500, NUM_WORKERS + 1)
VERSION = PolicyVersion(0, 1)


def run(quick: bool) -> list[Figure]:
    """Seconds for one version and all workers, in turns."""
    plan = _plan()
    encode_s = median([timed(lambda: encode_plan(plan)) for _ in range(3)])
    encoded = encode_plan(plan)
    rounds = 1 if quick else 5
    scale = NUM_WORKERS / WRITTEN_WORKERS
    written = [scale * timed(lambda: _write_for_each(plan)) for _ in range(rounds)]
    first = [timed(lambda: _append(plan, encoded)) for _ in range(rounds)]
    named = [timed(lambda: _name(plan)) for _ in range(rounds)]
    details = {
        "written_for_each_scaled_s": median(written),
        "encode_once_s": encode_s,
        "first_version_s": median(first),
        "later_version_s": median(named),
        "plan_bytes": len(encoded.data),
        "num_tensors": NUM_TENSORS,
        "num_workers": NUM_WORKERS,
        "num_workers_written": WRITTEN_WORKERS,
    }
    what = f"a plan of {NUM_TENSORS:,} tensors for {NUM_WORKERS} workers: written for each /"
    return [
        Figure(
            "plan_first_version",
            f"{what} encoded once and sent",
            None,
            "at least",
            [theirs / (encode_s + ours) for theirs, ours in zip(written, first, strict=True)],
            details,
        ),
        Figure(
            "plan_later_version",
            f"{what} named by its digest",
            None,
            "at least",
            [theirs / ours for theirs, ours in zip(written, named, strict=True)],
            details,
        ),
    ]


def _plan() -> WeightPlan:
    parts = ("gate_proj", "up_proj", "down_proj")
    names = (f"model.layers.{i // 768}.mlp.experts.{i % 768 // 3}.{parts[i % 3]}.weight" for i in range(NUM_TENSORS))
    return build_plan([TensorSpec(name, "bfloat16", (768, 2048)) for name in names], 256 * 1024 * 1024)


def _call(plan: WeightPlan, rank: int, *, with_plan: bool) -> PrepareWeightsCall:
    return PrepareWeightsCall(VERSION, plan if with_plan else None, EPOCH, rank, 60.0, plan.digest)


def _write_for_each(plan: WeightPlan) -> None:
    for rank in range(1, WRITTEN_WORKERS + 1):
        prepare_to_proto(_call(plan, rank, with_plan=True)).SerializeToString()


def _append(plan: WeightPlan, encoded: EncodedPlan) -> None:
    for rank in range(1, NUM_WORKERS + 1):
        prepare_to_bytes(_call(plan, rank, with_plan=False), encoded)


def _name(plan: WeightPlan) -> None:
    for rank in range(1, NUM_WORKERS + 1):
        prepare_to_proto(_call(plan, rank, with_plan=False)).SerializeToString()
