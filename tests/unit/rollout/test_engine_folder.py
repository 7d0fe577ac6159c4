"""vLLM reads every safetensors file of a folder, so the engine shows vLLM only one layout."""

from __future__ import annotations

from pathlib import Path

from rollmesh.data.model_folder import ModelFolder
from services.rollout.engine_folder import engine_folder
from tests.unit.data.test_model_folder import write_config, write_single_beside, write_weights


def test_a_folder_with_one_layout_is_used_itself(tmp_path: Path) -> None:
    write_weights(write_config(tmp_path) / "model.safetensors")
    with engine_folder(ModelFolder.read("model.path", tmp_path)) as path:
        assert path == tmp_path


def test_second_copies_are_hidden_and_everything_else_is_there(tmp_path: Path) -> None:
    write_single_beside(write_config(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with engine_folder(ModelFolder.read("model.path", tmp_path)) as path:
        assert {file.name for file in path.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
        assert (path / "tokenizer.json").read_text() == "{}"
    assert not path.exists()
    assert (tmp_path / "consolidated.safetensors").exists()
