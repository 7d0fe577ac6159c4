"""Causal language models of many architectures, tiny and with random weights."""

from __future__ import annotations

from typing import Any

import torch

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_HEADS = {"head_dim": 16}
_WINDOW = {**_HEADS, "sliding_window": 4}
_EXPERTS = {**_HEADS, "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
_DELTA = {
    **_HEADS,
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
_STATE_SPACE = {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "afmoe": {**_EXPERTS, "num_hidden_layers": 4, "num_dense_layers": 1, "num_shared_experts": 1},
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "biogpt": {},
    "bloom": {"n_layer": 2, "n_head": 2},
    "cohere": {},
    "falcon": {"alibi": True},
    "falcon_h1": {**_HEADS, **_MAMBA2, "mamba_d_ssm": 32, "mamba_n_heads": 4},
    "gemma2": _WINDOW,
    "gemma3_text": {**_WINDOW, "num_hidden_layers": 6},
    "gpt2": _GPT2,
    "gpt_neo": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gpt_neox": {},
    "gpt_oss": {**_EXPERTS, "sliding_window": 4},
    "gptj": {**_GPT2, "rotary_dim": 8},
    "granitemoehybrid": {**_MAMBA2, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    "jamba": {
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "use_mamba_kernels": False,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama": _HEADS,
    "mamba": {"state_size": 8},
    "mamba2": _STATE_SPACE,
    "minimax": {**_EXPERTS, "layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    "mistral": _WINDOW,
    "mixtral": _EXPERTS,
    "mpt": {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 128},
    "nemotron_h": {
        **_EXPERTS,
        "hybrid_override_pattern": "M*M-",
        "num_hidden_layers": 4,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "olmo2": {},
    "olmo_hybrid": _DELTA,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen3": _HEADS,
    "qwen3_5_text": _DELTA,
    "qwen3_moe": _EXPERTS,
    "qwen3_next": {**_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 16},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8},
    "starcoder2": {},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 2, "init_std": 0.3},
}


def make_model(architecture: str, **changes: Any) -> Any:
    """A model in float32 with the attention that the learner chooses on a CPU."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from rollmesh.models.attention import AUTO, choose_attention
    from rollmesh.models.loading import turn_randomness_off

    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **{**SIZES, **ARCHITECTURES[architecture], **changes})
    turn_randomness_off(config)
    attention = choose_attention(config, AUTO, "float32", torch.device("cpu"), "learner.attention")
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().train()
