from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)
from transformers.core_model_loading import Concatenate, WeightConverter

from rollmesh.errors import ConfigError
from rollmesh.types import TensorSpec
from services.learner.checkpoint_names import CheckpointNames, stored_weights
from tests.integration.tiny_model import SIZES, make_tiny_mixture, make_tiny_model


def specs_of(model: PreTrainedModel) -> list[TensorSpec]:
    return [TensorSpec(name, "float32", tuple(tensor.shape)) for name, tensor in stored_weights(model)]


def make_mixtral(folder: Path) -> PreTrainedModel:
    config = MixtralConfig(**SIZES, num_hidden_layers=2, num_local_experts=3, num_experts_per_tok=2)
    model = MixtralForCausalLM(config)
    model.save_pretrained(folder)
    return model


def make_corrected_mixture(folder: Path) -> PreTrainedModel:
    """Write a mixture whose routers have a buffer that a checkpoint stores and no step trains."""
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
    model = Glm4MoeForCausalLM(Glm4MoeConfig(**SIZES, **experts, num_hidden_layers=2, head_dim=32))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("make", [make_tiny_model, make_tiny_mixture, make_mixtral, make_corrected_mixture])
def test_a_model_is_sent_as_its_checkpoint_stores_it(tmp_path: Path, make) -> None:
    make(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    parameters = {name: tensor.detach() for name, tensor in stored_weights(model)}

    names = CheckpointNames(model, specs_of(model))

    stored = load_file(tmp_path / "model.safetensors")
    assert {spec.name: spec.shape for spec in names.specs} == {n: tuple(t.shape) for n, t in stored.items()}
    converted = names.convert(parameters)
    assert converted.keys() == stored.keys()
    assert all(torch.equal(converted[name], stored[name]) for name in stored)


def test_tensors_of_one_parameter_follow_each_other_and_name_it_once(tmp_path: Path) -> None:
    model = make_tiny_mixture(tmp_path)
    names = CheckpointNames(model, specs_of(model))

    assert names.parameters_of(spec.name for spec in names.specs) == [spec.name for spec in specs_of(model)]
    experts = [f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in range(4)]
    assert names.parameters_of(experts) == ["model.layers.1.mlp.experts.gate_up_proj"]


def test_what_needs_no_conversion_is_not_copied(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    converted = CheckpointNames(model, specs_of(model)).convert(parameters)
    assert all(converted[name] is tensor for name, tensor in parameters.items())


def test_a_checkpoint_that_joins_what_the_model_has_apart_is_refused(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path)
    joined = WeightConverter(
        source_patterns="self_attn.qk_proj.weight",
        target_patterns=["self_attn.q_proj.weight", "self_attn.k_proj.weight"],
        operations=[Concatenate(dim=0).reverse_op],
    )
    model._weight_conversions = [joined]
    with pytest.raises(ConfigError, match="stores as one tensor"):
        CheckpointNames(model, specs_of(model))
