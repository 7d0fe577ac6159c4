"""The attention of a model: chosen, checked, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rollmesh.errors import ConfigError
from rollmesh.models import attention
from rollmesh.models.attention import choose_attention, implementation_of, settle_attention
from rollmesh.models.loading import load_causal_lm
from services.learner.policy import PolicyModel
from tests.unit.models.architectures import make_model
from tests.unit.models.sources import source_of
from tests.unit.models.table import make_probe

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def capped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma2")
    make_model("gemma2").save_pretrained(folder)
    return folder


def test_a_model_with_a_soft_cap_computes_its_attention_itself(capped: Path) -> None:
    assert implementation_of(load_causal_lm(source_of(capped))) == "eager"


def test_an_implementation_that_ignores_the_soft_cap_is_refused(capped: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_causal_lm(source_of(capped, "sdpa"))
    assert str(caught.value) == (
        "learner.attention: 'sdpa' ignores the soft cap of gemma2 (attn_logit_softcapping is 50.0); "
        "remove it, or set it to eager"
    )


def test_implementations_that_take_the_soft_cap_are_the_users_choice() -> None:
    config = make_model("gemma2").config
    for name in ("eager", "flex_attention", "flash_attention_2", "kernels-community/flash-attn3"):
        assert choose_attention(config, name, "bfloat16", CUDA, "learner.attention") == name


@pytest.mark.parametrize("takes", [False, True])
def test_on_cuda_flash_attention_is_taken_where_it_takes_the_soft_cap(
    takes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_flash_attention_takes_soft_cap", lambda: takes)
    config = make_model("gemma2").config
    expected = "flash_attention_2" if takes else "eager"
    assert choose_attention(config, "auto", "bfloat16", CUDA, "learner.attention") == expected
    assert choose_attention(config, "auto", "float32", CUDA, "learner.attention") == "eager"
    assert choose_attention(config, "auto", "bfloat16", CPU, "learner.attention") == "eager"


def test_other_models_leave_the_choice_to_transformers() -> None:
    assert choose_attention(make_model("mistral").config, "auto", "float32", CPU, "learner.attention") is None
    assert implementation_of(make_model("mistral")) == "sdpa"
    assert implementation_of(make_model("gpt_oss")) == "eager"


def _without_scaling(*args: Any, **options: Any) -> Any:
    return sdpa_attention_forward(*args, **{**options, "scaling": 1.0})


@pytest.fixture
def wrong_model() -> Any:
    """A model whose attention leaves something out without a word."""
    AttentionInterface.register("wrong", _without_scaling)
    model = make_model("llama")
    model.set_attn_implementation("wrong")
    return model


def test_attention_that_changes_the_outputs_is_replaced(wrong_model: Any, caplog: pytest.LogCaptureFixture) -> None:
    policy = PolicyModel(wrong_model, 1.0)
    settle_attention(wrong_model, lambda: make_probe(policy), "auto", "learner.attention")
    assert implementation_of(wrong_model) == "eager"
    assert "llama with wrong attention: its outputs differ from those of eager attention by up to" in caplog.text


def test_attention_that_the_user_chose_and_that_changes_the_outputs_is_refused(wrong_model: Any) -> None:
    policy = PolicyModel(wrong_model, 1.0)
    with pytest.raises(ConfigError, match=r"learner\.attention: 'wrong' changes the outputs of llama .* auto or eager"):
        settle_attention(wrong_model, lambda: make_probe(policy), "wrong", "learner.attention")
    assert implementation_of(wrong_model) == "wrong"


def test_attention_that_is_right_stays() -> None:
    model = make_model("mistral")
    policy = PolicyModel(model, 1.0)
    settle_attention(model, lambda: make_probe(policy), "auto", "learner.attention")
    assert implementation_of(model) == "sdpa"
