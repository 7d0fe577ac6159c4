"""The model of the benches that need no trained one: random weights, and no end-of-sequence token, so that an answer is
exactly as long as it may be."""

from __future__ import annotations

from pathlib import Path

from tests.integration.tiny_model import VOCABULARY, tiny_tokenizer


def write_model(folder: Path, *, hidden: int = 128, layers: int = 4) -> Path:
    """Write a Qwen2 of some 700,000 parameters with the demo's tokenizer; returns ``folder``."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=1024,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    Qwen2ForCausalLM(config).float().save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    return folder
