"""Tiny models that start in seconds and that every engine loads: a Qwen2 with 64 words, and a mixture of experts."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCABULARY = ["<pad>", "<bos>", "<eos>", *map(str, range(51)), "+", "-", "*", "/", "=", ";", "?", ":", "ok", "no"]
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2


SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}


def make_tiny_model(folder: Path, *, is_tied: bool = True, seed: int = 0) -> Qwen2ForCausalLM:
    """Write a model folder (configuration, float32 weights, word-level tokenizer) and return the model."""
    torch.manual_seed(seed)
    config = Qwen2Config(**SIZES, num_hidden_layers=3, tie_word_embeddings=is_tied)
    model = Qwen2ForCausalLM(config).float().eval()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def make_tiny_mixture(folder: Path, *, seed: int = 0) -> Qwen3MoeForCausalLM:
    """Write a model folder like that of `make_tiny_model`, with four experts a layer, two for each token."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        **SIZES, num_hidden_layers=2, head_dim=32, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2
    )
    model = Qwen3MoeForCausalLM(config).float().eval()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<pad>"
    )
