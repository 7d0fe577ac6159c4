"""A head size that vLLM lacks on CPU is reported before an engine starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from rollmesh.data.model_folder import ModelFolder
from rollmesh.errors import ConfigError
from services.rollout import kernels
from services.rollout.kernels import check_head_size, cpu_head_sizes, head_size


def model(**settings: object) -> ModelFolder:
    return ModelFolder("model.path", Path("model"), settings)


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"hidden_size": 64, "num_attention_heads": 4}, 16),
        ({"hidden_size": 64, "num_attention_heads": 4, "head_dim": 32}, 32),
        ({"n_embd": 768, "n_head": 12}, 64),
        ({"text_config": {"hidden_size": 64, "num_attention_heads": 2}}, 32),
        ({"hidden_size": 64, "num_attention_heads": 4, "kv_lora_rank": 8}, None),
        ({"hidden_size": 64}, None),
    ],
)
def test_the_head_size_is_read_from_config_json(settings: dict[str, object], size: int | None) -> None:
    assert head_size(model(**settings)) == size


def test_a_size_without_a_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "cpu_head_sizes", lambda: frozenset({32, 64}))
    check_head_size(model(head_dim=64))
    with pytest.raises(ConfigError) as caught:
        check_head_size(model(head_dim=16))
    assert str(caught.value) == (
        "model.path: model has attention heads of size 16, for which vLLM has no kernel on CPU; "
        "use a model with heads of 32, 64, or a GPU"
    )


def test_nothing_is_refused_where_the_sizes_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "cpu_head_sizes", frozenset)
    check_head_size(model(head_dim=7))


def test_the_installed_vllm_lists_its_sizes() -> None:
    pytest.importorskip("vllm", exc_type=ImportError)
    if not kernels._is_for_cpu():
        pytest.skip("this vLLM is not for CPUs")
    assert {32, 64, 128} <= cpu_head_sizes()
