"""Tiny models with random weights, saved as real folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, Qwen2Config

VOCAB_SIZE = 50


def config_of(kind: str) -> Any:
    shape: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
    }
    match kind:
        case "qwen2":
            return Qwen2Config(**shape, tie_word_embeddings=True)
        case "gemma2":  # scales and caps its logits after the output layer; sliding windows
            return Gemma2Config(**shape, head_dim=16, final_logit_softcapping=5.0, sliding_window=16)
        case "gpt2":  # absolute positions
            return GPT2Config(
                vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=2, n_positions=128, initializer_range=0.3
            )
    raise AssertionError(kind)


@pytest.fixture(scope="session", params=["qwen2", "gemma2", "gpt2"])
def any_model_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("qwen2"), "qwen2")


def save_model(folder: Path, kind: str) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config_of(kind)).save_pretrained(folder)
    return folder
