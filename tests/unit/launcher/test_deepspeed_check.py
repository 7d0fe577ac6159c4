"""A key of `learner.deepspeed` that DeepSpeed would pass over in silence is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from rollmesh.errors import ConfigError
from services.launcher.deepspeed_check import check_deepspeed

pytest.importorskip("deepspeed", exc_type=ImportError)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"foo": 1}, "learner.deepspeed.foo: is not a key of DeepSpeed's configuration; correct or remove it"),
        (
            {"zero_optimisation": {}},
            "learner.deepspeed.zero_optimisation: is not a key of DeepSpeed's configuration; did",
        ),
        (
            {"zero_optimization": {"offload_optimiser": {}}},
            "zero_optimization.offload_optimiser: is not a key of DeepSpeed's configuration; did you mean",
        ),
        (
            {"zero_optimization": {"offload_param": {"devise": "cpu"}}},
            "zero_optimization.offload_param.devise: is not a key of DeepSpeed's configuration; did you mean 'device'?",
        ),
        ({"optimizer": {"type": "Adam"}}, "learner.deepspeed.optimizer: is set by the mesh itself; set"),
        (
            {"zero_optimization": {"stage": 2}},
            "zero_optimization.stage: is set by the mesh itself; set learner.zero_st",
        ),
    ],
)
def test_a_key_that_would_change_nothing_or_too_much_is_refused(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_deepspeed(settings)
    assert fault in str(caught.value)


def test_keys_that_deepspeed_reads_are_accepted() -> None:
    names = """wandb tensorboard csv_monitor comet compile hybrid_engine comms_logger flops_profiler timers aio
    activation_checkpointing data_types checkpoint communication_data_type wall_clock_breakdown memory_breakdown
    prescale_gradients gradient_predivide_factor dump_state zero_allow_untested_optimizer torch_autocast"""
    check_deepspeed({name: {} for name in names.split()})
    zero: dict[str, Any] = dict.fromkeys(["overlap_comm", "reduce_bucket_size", "zero_hpz_partition_size"])
    offload = {"device": "cpu", "pin_memory": True, "buffer_count": 4}
    check_deepspeed({"zero_optimization": {**zero, "offload_optimizer": offload, "offload_param": offload}})
