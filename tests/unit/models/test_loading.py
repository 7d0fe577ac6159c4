"""Which folders are refused when a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import Qwen2ForCausalLM

from rollmesh.errors import ConfigError
from rollmesh.models.loading import load_causal_lm
from tests.unit.learner.samples import write_tiny_model
from tests.unit.models.sources import source_of


def test_a_folder_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"model\.path: .* lacks 1 weights .*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_causal_lm(source_of(tmp_path))


def test_a_model_without_an_output_layer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Qwen2ForCausalLM, "get_output_embeddings", lambda self: None)
    with pytest.raises(
        ConfigError, match=r"model\.path: Qwen2ForCausalLM in .* gives no output embeddings; name another"
    ):
        load_causal_lm(source_of(write_tiny_model(tmp_path)))
