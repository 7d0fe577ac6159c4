"""A mesh whose every file exists and is right, to be spoilt one thing at a time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

Tree = dict[str, object]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """The content of the mesh file."""
    write_model(tmp_path / "model")
    (tmp_path / "train.jsonl").write_text(json.dumps({"input": "one two", "label": 3}) + "\n")
    (tmp_path / "reward.py").write_text("def reward_func(queries, prompts, labels):\n    return {'rewards': [0.0]}\n")
    return {
        "run": {"name": "tiny", "directory": str(tmp_path / "runs")},
        "model": {"path": str(tmp_path / "model"), "max_length": 8},
        "data": {"path": str(tmp_path / "train.jsonl"), "label_key": "label"},
        "training": {"steps": 2, "prompts_per_step": 1, "samples_per_prompt": 2},
        "sampling": {"max_new_tokens": 4},
        "reward": {"function": str(tmp_path / "reward.py")},
    }


def write_model(model: Path) -> None:
    """Two layers, four tokens, sixteen positions: as much of a model folder as is read without loading it."""
    model.mkdir()
    settings = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 4,
        "hidden_size": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": 16,
    }
    (model / "config.json").write_text(json.dumps(settings))
    tensors = {"model.embed_tokens.weight": np.zeros((4, 2), np.float32)}
    tensors |= {f"model.layers.{layer}.mlp.weight": np.zeros((2, 2), np.float32) for layer in range(2)}
    save_file(tensors, model / "model.safetensors")
    words = {word: index for index, word in enumerate(["<unk>", "one", "two", "user"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend"}))
