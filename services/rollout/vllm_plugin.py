"""The seam between vLLM's processes and the mesh: what vLLM loads by name in each of its workers.

`register` makes our transport known to vLLM under `BACKEND`.
`MeshWorkerExtension` adds the calls that vLLM's own weight-transfer interface has no room for: joining and receiving
while generation goes on, and asking how far that is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rollmesh.types import TensorSpec, WeightPlan

if TYPE_CHECKING:
    from services.rollout.weight_transfer import MeshWeightTransferEngine

BACKEND = "rollmesh"


def register() -> None:
    """Make the transport known to this process' vLLM; repeating it is harmless, as vLLM demands of plug-ins."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "services.rollout.weight_transfer", "MeshWeightTransferEngine"
        )


class MeshWorkerExtension:
    """Mixed into vLLM's worker class; each method is one cheap call between two engine steps.

    Arguments and answers are plain values, as vLLM's messages demand.
    """

    weight_transfer_engine: MeshWeightTransferEngine
    rank: int

    def mesh_join(self, epoch: dict[str, Any], first_rank: int, deadline_s: float) -> None:
        """``first_rank`` is that of the engine's first worker; the others follow."""
        self.weight_transfer_engine.begin_join(epoch, first_rank + self.rank, deadline_s)

    def mesh_hold_plan(self, plan: dict[str, Any]) -> None:
        """``plan`` is what `plan_to_message` made; it holds for all transfers until the next one is given."""
        self.weight_transfer_engine.hold_plan(plan_from_message(plan))

    def mesh_receive(self, deadline_s: float) -> None:
        self.weight_transfer_engine.begin_receive(deadline_s)

    def mesh_poll(self) -> dict[str, Any]:
        return self.weight_transfer_engine.poll()

    def mesh_abort(self) -> None:
        self.weight_transfer_engine.abort()


def plan_to_message(plan: WeightPlan) -> dict[str, Any]:
    """A plan as vLLM can carry it to its workers."""
    return {
        "tensors": [[tensor.name, tensor.dtype, list(tensor.shape)] for tensor in plan.tensors],
        "bucket_starts": list(plan.bucket_starts),
        "digest": plan.digest,
    }


def plan_from_message(message: dict[str, Any]) -> WeightPlan:
    tensors = tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in message["tensors"])
    return WeightPlan(tensors, tuple(message["bucket_starts"]), message["digest"])


# vLLM imports this module in every worker for the extension's sake, before it makes the transport: no entry point of
# the plug-in group is needed, which every other vLLM of the environment would load too.
register()
