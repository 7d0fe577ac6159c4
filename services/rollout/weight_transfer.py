"""The mesh's weight transport in a vLLM worker process: vLLM's interface in front of a `WeightInbox`.

The engine calls `hold_plan` once. At every version the engine joins and receives through `begin_join`, `begin_receive`,
`poll` and `abort`, while vLLM generates. vLLM's own three steps (start, update, finish) load the received weights while
vLLM is paused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from rollmesh.errors import DeadlineError, RollMeshError, WeightTransferError
from rollmesh.types import WeightEpoch, WeightPlan
from rollmesh.weights.inbox import WeightInbox
from services.rollout.owner import follow_owner


@dataclass
class NoInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """No settings: `begin_join` sets the transport up, once for each weight epoch."""


@dataclass
class LoadInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """The request to load a received transfer.

    Attributes:
        digest: the digest of the transfer to load.
    """

    digest: bytes = field(default=b"")


class MeshWeightTransferEngine(WeightTransferEngine[NoInitInfo, LoadInfo]):  # type: ignore[misc]
    """Receives weights beside the live weights, and loads the received weights on demand."""

    init_info_cls = NoInitInfo
    update_info_cls = LoadInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        follow_owner()
        self._inbox = WeightInbox(self.device)
        self._plan: WeightPlan | None = None
        self._parameters = {name for name, _ in self.model.named_parameters()}

    def begin_join(self, epoch: dict[str, Any], rank: int, deadline_s: float) -> None:
        self._inbox.begin_join(WeightEpoch(**epoch), rank, deadline_s)

    def hold_plan(self, plan: WeightPlan) -> None:
        self._plan = plan

    def begin_receive(self, deadline_s: float) -> None:
        """Begin to receive. Raises WeightTransferError if the engine gave no plan."""
        if self._plan is None:
            raise WeightTransferError("there is no plan to receive by")
        self._inbox.begin_receive(self._plan, deadline_s)

    def poll(self) -> dict[str, Any]:
        """Return the state of the transfer: ``state`` is "running", "done" or "failed".

        A transfer that is done adds digest, num_bytes and transfer_s. A failed transfer adds is_late and reason.
        """
        try:
            received = self._inbox.poll()
        except RollMeshError as error:
            return {"state": "failed", "is_late": isinstance(error, DeadlineError), "reason": str(error)}
        if received is None:
            return {"state": "running"}
        return {
            "state": "done",
            "digest": received.digest,
            "num_bytes": received.num_bytes,
            "transfer_s": received.transfer_s,
        }

    def abort(self) -> None:
        self._inbox.abort()

    def init_transfer_engine(self, init_info: NoInitInfo) -> None:
        """Do nothing: see `NoInitInfo`."""

    def start_weight_update(self) -> None:
        if self.device.type == "cpu":
            _forget_expert_kernels(self.model)
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load the received weights. The base class would synchronise an accelerator, which a CPU machine lacks."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: LoadInfo) -> None:
        """Load the received weights into the model.

        Raises:
            WeightTransferError: the inbox does not hold the transfer, or the transfer does not cover the model.
        """
        loaded = self.model.load_weights(self._inbox.tensors(update_info.digest))
        if self.model_config.quantization is not None:
            return  # a quantised model has parameters that no checkpoint holds
        # A model that returns None does not tell which parameters it has loaded.
        missing = self._parameters - set(self._parameters if loaded is None else loaded)
        missing |= _half_loaded(self.model)
        if missing:
            problem = f"the transfer lacks weights for {len(missing)} parts of the engine's model"
            raise WeightTransferError(f"{problem}, {min(missing)!r} first")

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            _repack_heads(self.model)
        else:
            torch.accelerator.synchronize()
        self._inbox.drop()

    def shutdown(self) -> None:
        self._inbox.abort()


def _half_loaded(model: torch.nn.Module) -> set[str]:
    """Return the names of the linear layers that the running reload has filled only in part.

    vLLM joins tensors that a checkpoint stores apart, such as queries, keys and values. vLLM counts the joined tensor
    as loaded when one piece is loaded. vLLM's reload keeps a layer open that still waits for elements.
    """
    layers = [
        (name, get_layerwise_info(layer)) for name, layer in model.named_modules() if isinstance(layer, LinearBase)
    ]
    return {name for name, layer in layers if layer.can_load() and layer.load_numel > 0}


def _forget_expert_kernels(model: torch.nn.Module) -> None:
    """Make the reload build the kernels of the experts anew on CPU.

    vLLM packs the experts' weights only when vLLM makes the kernel. A reload would leave the new weights unpacked, and
    the kernel would read them as packed weights.
    """
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, UnquantizedFusedMoEMethod):
            method.moe_kernel = None


def _repack_heads(model: torch.nn.Module) -> None:
    """Give the output layers their new weights on CPU.

    On CPU vLLM multiplies with a repacked copy of the head. vLLM's reload makes no new copy for a head that shares its
    tensor with the input embedding: the engine would report success and go on sampling with the old head.
    """
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and isinstance(module.quant_method, UnquantizedEmbeddingMethod):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)
