"""Connects vLLM's processes with the mesh. vLLM loads this module by name in each of its worker processes.

`register` makes the mesh's transport known to vLLM under `BACKEND`.
`MeshWorkerExtension` adds calls that vLLM's own weight-transfer interface lacks: joining and receiving while generation
goes on, and asking how far the transfer is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rollmesh.types import TensorSpec, WeightPlan

if TYPE_CHECKING:
    from services.rollout.weight_transfer import MeshWeightTransferEngine

BACKEND = "rollmesh"


def register() -> None:
    """Make the transport known to the vLLM of this process. Safe to repeat, as vLLM demands of plug-ins."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "services.rollout.weight_transfer", "MeshWeightTransferEngine"
        )


class MeshWorkerExtension:
    """The methods that vLLM adds to its worker class. Each method is one cheap call between two engine steps.

    Arguments and answers are plain values, as vLLM's messages demand.
    """

    weight_transfer_engine: MeshWeightTransferEngine
    rank: int

    def mesh_join(self, epoch: dict[str, Any], first_rank: int, deadline_s: float) -> None:
        """Begin to join the group. ``first_rank`` is the rank of the engine's first worker; the other workers
        follow."""
        self.weight_transfer_engine.begin_join(epoch, first_rank + self.rank, deadline_s)

    def mesh_hold_plan(self, plan: dict[str, Any]) -> None:
        """Keep a plan that `plan_to_message` made. The plan is valid for all transfers until the next plan comes."""
        self.weight_transfer_engine.hold_plan(plan_from_message(plan))

    def mesh_receive(self, deadline_s: float) -> None:
        self.weight_transfer_engine.begin_receive(deadline_s)

    def mesh_poll(self) -> dict[str, Any]:
        return self.weight_transfer_engine.poll()

    def mesh_abort(self) -> None:
        self.weight_transfer_engine.abort()


def plan_to_message(plan: WeightPlan) -> dict[str, Any]:
    """Return a plan in the form that vLLM can send to its workers."""
    return {
        "tensors": [[tensor.name, tensor.dtype, list(tensor.shape)] for tensor in plan.tensors],
        "bucket_starts": list(plan.bucket_starts),
        "digest": plan.digest,
    }


def plan_from_message(message: dict[str, Any]) -> WeightPlan:
    tensors = tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in message["tensors"])
    return WeightPlan(tensors, tuple(message["bucket_starts"]), message["digest"])


# vLLM imports this module in every worker because of the extension, before vLLM makes the transport. So the mesh needs
# no entry point of the plug-in group, which every other vLLM of the environment would load too.
register()
