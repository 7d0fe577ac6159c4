"""An export is the policy's folder with new weights; every other file stays as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rollmesh.errors import ConfigError
from services.learner.export import Exporter
from tests.integration.tiny_model import SIZES, tiny_tokenizer


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a small model with its tokenizer, as models are published."""
    path = tmp_path / "model"
    Qwen2ForCausalLM(Qwen2Config(**SIZES, num_hidden_layers=1)).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def export(folder: Path, model: PreTrainedModel) -> Path:
    target = folder.parent / "export"
    Exporter(model, folder).write(target, {name: p.detach() + 1 for name, p in model.named_parameters()})
    return target


def test_an_export_has_the_new_weights_and_loads_again(folder: Path) -> None:
    model = load(folder)
    again = load(export(folder, model))
    old = dict(model.named_parameters())
    assert all(torch.equal(parameter, old[name] + 1) for name, parameter in again.named_parameters())
    tokenizers = [AutoTokenizer.from_pretrained(path, local_files_only=True) for path in (folder, again.name_or_path)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()


def test_generation_settings_that_transformers_would_not_write_are_exported_as_they_are(folder: Path) -> None:
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.6, "top_p": 0.9}))
    assert (export(folder, load(folder)) / file.name).read_text() == file.read_text()


def test_a_tokenizer_with_code_of_its_own_is_exported_without_running_it(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "mine.py").write_text("raise SystemExit('code that ran')\n")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    target = export(folder, load(folder))
    for name in ("mine.py", "tokenizer_config.json", "additional_chat_templates/tools.jinja"):
        assert (target / name).read_bytes() == (folder / name).read_bytes()


def test_no_second_copy_of_the_old_weights_is_exported(folder: Path) -> None:
    (folder / "consolidated.safetensors").write_bytes(b"old")
    (folder / "params.json").write_text("{}")
    (folder / "model.safetensors").rename(folder / "policy.safetensors")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "transformers_weights": "policy.safetensors"}))
    target = export(folder, load(folder))
    assert [file.name for file in target.glob("*.safetensors")] == ["model.safetensors"]
    assert not (target / "params.json").exists()
    assert load(target)


def test_a_model_that_cannot_be_exported_is_told_before_anything_is_trained(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folder)

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("the settings\ncontradict each other")

    monkeypatch.setattr(model.config, "save_pretrained", refuse)
    with pytest.raises(ConfigError, match=r"model\.path: .* cannot be exported \(the settings contradict each other\)"):
        Exporter(model, folder)
