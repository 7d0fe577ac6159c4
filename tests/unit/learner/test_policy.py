"""The policy's model, without a training engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from rollmesh.errors import ConfigError
from rollmesh.models.loading import load_causal_lm
from services.learner.policy import PolicyModel
from tests.unit.learner.samples import VOCABULARY, write_tiny_model
from tests.unit.models.sources import source_of

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "num_experts_per_tok": 2,
}
INPUT_IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
POSITION_IDS = torch.tensor([[0, 1, 2, 0, 1, 2]])
PREDICTORS = torch.tensor([1, 3, 4])
TARGETS = torch.tensor([7, 9, 10])
NOTHING = torch.zeros(0, dtype=torch.int64)


def _mixture() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SIZES, head_dim=16, moe_intermediate_size=16, num_experts=4, initializer_range=0.2)
    return Qwen3MoeForCausalLM(config)


def _dense(folder: Path) -> Any:
    return load_causal_lm(source_of(write_tiny_model(folder)))


def _gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_the_balancing_loss_is_the_models_own_over_all_positions() -> None:
    mixture = _mixture()
    model = PolicyModel(mixture, 1.0, balances_experts=True)
    logprobs, entropies, balance = model(INPUT_IDS, POSITION_IDS, PREDICTORS, TARGETS)
    output = mixture(input_ids=INPUT_IDS, position_ids=POSITION_IDS, use_cache=False, output_router_logits=True)
    plain = torch.log_softmax(output.logits[0], -1)
    torch.testing.assert_close(balance, output.aux_loss)
    torch.testing.assert_close(logprobs, plain[PREDICTORS, TARGETS], atol=1e-5, rtol=0)
    assert entropies.shape == (3,)
    balance.backward()
    router = mixture.model.layers[0].mlp.gate.weight
    assert router.grad is not None
    assert router.grad.abs().max() > 0


def test_without_a_coefficient_the_routers_are_not_asked() -> None:
    asked = []
    mixture = _mixture()
    forward = mixture.model.forward

    def spy(*args: Any, **options: Any) -> Any:
        asked.append(options.get("output_router_logits"))
        return forward(*args, **options)

    mixture.model.forward = spy
    balance = PolicyModel(mixture, 1.0)(INPUT_IDS, POSITION_IDS, PREDICTORS, TARGETS)[2]
    assert asked == [False]
    assert balance.item() == 0
    assert not balance.requires_grad


def test_a_balancing_loss_of_a_model_without_routers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.aux_loss_coef: .* Qwen2ForCausalLM has no routers"):
        PolicyModel(_dense(tmp_path), 1.0, balances_experts=True)


def test_an_empty_micro_batch_has_gradients_of_exactly_0_experts_and_entropies_included() -> None:
    model = PolicyModel(_mixture(), 1.0, balances_experts=True)
    logprobs, entropies, balance = model(
        torch.zeros((1, 2), dtype=torch.int64), torch.arange(2)[None], NOTHING, NOTHING
    )
    (logprobs.sum() + entropies.sum() + balance * 0.0).backward()
    assert all(gradient.abs().max() == 0 for gradient in _gradients(model))


def test_an_entropy_bonus_reaches_the_weights_at_the_sampling_temperature(tmp_path: Path) -> None:
    causal_lm = _dense(tmp_path)
    PolicyModel(causal_lm, 0.7)(INPUT_IDS, POSITION_IDS, PREDICTORS, TARGETS)[1].sum().backward()
    plain = Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    logits = plain(input_ids=INPUT_IDS, position_ids=POSITION_IDS, use_cache=False).logits[0, PREDICTORS] / 0.7
    torch.distributions.Categorical(logits=logits).entropy().sum().backward()  # type: ignore[no-untyped-call]
    for (name, ours), theirs in zip(causal_lm.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_dropout_and_the_routers_noise_are_off(tmp_path: Path) -> None:
    config = MixtralConfig(**SIZES, num_local_experts=4, router_jitter_noise=0.3, attention_dropout=0.4)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    model = PolicyModel(load_causal_lm(source_of(tmp_path)), 1.0).train()
    first, second = (model(INPUT_IDS, POSITION_IDS, PREDICTORS, TARGETS)[0] for _ in range(2))
    assert torch.equal(first, second)
