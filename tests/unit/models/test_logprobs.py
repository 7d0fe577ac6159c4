"""Chunked log-probabilities against plain autograd."""

import pytest
import torch

from rollmesh.models.logprobs import target_logprobs, token_logprobs


def _plain(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    distribution = torch.distributions.Categorical(logits=logits.float() / temperature)
    return distribution.log_prob(targets), distribution.entropy()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
@pytest.mark.parametrize("chunk_elements", [1, 13 * 4, 10**9])
def test_values_and_gradients_equal_the_plain_computation(temperature: float, chunk_elements: int) -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(11, 13)).requires_grad_()
    targets, weights = torch.randint(0, 13, (11,)), torch.randn(11)
    expected, expected_entropies = _plain(logits, targets, temperature)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), logits)
    logprobs, entropies = token_logprobs(logits, targets, temperature, chunk_elements)
    (gradient,) = torch.autograd.grad((logprobs * weights).sum(), logits)
    torch.testing.assert_close(logprobs, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(entropies, expected_entropies.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
@pytest.mark.parametrize("chunk_elements", [1, 13 * 4, 10**9])
@pytest.mark.parametrize("logprob_weight", [0.0, 1.0])
def test_the_gradient_of_the_entropies_equals_that_of_plain_autograd_in_float64(
    temperature: float, chunk_elements: int, logprob_weight: float
) -> None:
    torch.manual_seed(3)
    logits = (3 * torch.randn(11, 13)).requires_grad_()
    targets, weights = torch.randint(0, 13, (11,)), torch.randn(2, 11)
    exact = logits.detach().double().requires_grad_()
    log_softmax = torch.log_softmax(exact / temperature, -1)
    picked, entropy = log_softmax[torch.arange(11), targets], -(log_softmax.exp() * log_softmax).sum(-1)
    (expected,) = torch.autograd.grad(
        logprob_weight * (picked * weights[0]).sum() + (entropy * weights[1]).sum(), exact
    )
    logprobs, entropies = token_logprobs(logits, targets, temperature, chunk_elements)
    loss = (entropies * weights[1]).sum()
    if logprob_weight:
        loss = loss + (logprobs * weights[0]).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient.double(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("chunk_elements", [1, 13 * 4, 10**9])
def test_log_probabilities_alone_have_a_temperature_for_each_token(chunk_elements: int) -> None:
    torch.manual_seed(4)
    logits, targets = 3 * torch.randn(11, 13), torch.randint(0, 13, (11,))
    temperatures = torch.tensor([0.5, 1.0, 1.3])[torch.arange(11) % 3]
    expected = (logits / temperatures[:, None]).log_softmax(-1)[torch.arange(11), targets]
    logprobs = target_logprobs(logits, targets, temperatures, chunk_elements)
    torch.testing.assert_close(logprobs, expected, atol=1e-6, rtol=1e-6)
    assert target_logprobs(logits[:0], targets[:0], temperatures[:0]).shape == (0,)


def test_the_gradient_is_that_of_finite_differences() -> None:
    torch.manual_seed(1)
    logits, targets = torch.randn(3, 5), torch.tensor([4, 0, 2])
    leaf = logits.clone().requires_grad_()
    token_logprobs(leaf, targets, 1.3)[0].sum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    shift = torch.zeros_like(logits)
    shift[1, 3] = 1e-2
    after, before = (token_logprobs(logits + s, targets, 1.3)[0].sum() for s in (shift, -shift))
    assert leaf.grad[1, 3].item() == pytest.approx(((after - before) / 2e-2).item(), abs=1e-4)


def test_bfloat16_logits_are_computed_in_float32() -> None:
    torch.manual_seed(2)
    logits, targets = torch.randn(6, 50, dtype=torch.bfloat16), torch.randint(0, 50, (6,))
    logprobs, _ = token_logprobs(logits, targets, 1.0)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, _plain(logits, targets, 1.0)[0], atol=1e-6, rtol=1e-6)


def test_a_vocabulary_entry_that_is_masked_out_does_not_spoil_the_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0, float("-inf")]])
    logprobs, entropies = token_logprobs(logits, torch.tensor([1]), 1.0)
    assert logprobs.item() == pytest.approx(-0.693147, abs=1e-5)
    assert entropies.item() == pytest.approx(0.693147, abs=1e-5)


def test_a_vocabulary_entry_that_is_masked_out_gets_no_gradient() -> None:
    logits = torch.tensor([[0.3, -0.2, float("-inf"), 1.0]], requires_grad=True)
    logprobs, entropies = token_logprobs(logits, torch.tensor([1]), 0.8)
    (gradient,) = torch.autograd.grad((logprobs + 2 * entropies).sum(), logits)
    finite = torch.tensor([[0.3, -0.2, 1.0]], requires_grad=True)
    logprobs, entropies = _plain(finite, torch.tensor([1]), 0.8)
    (expected,) = torch.autograd.grad((logprobs + 2 * entropies).sum(), finite)
    assert gradient[0, 2] == 0
    torch.testing.assert_close(gradient[:, [0, 1, 3]], expected, atol=1e-6, rtol=1e-5)


def test_no_tokens_are_no_problem() -> None:
    logits = torch.randn(0, 7, requires_grad=True)
    logprobs, entropies = token_logprobs(logits, torch.zeros(0, dtype=torch.int64), 1.0)
    (logprobs.sum() + entropies.sum()).backward()  # type: ignore[no-untyped-call]
    assert logprobs.shape == entropies.shape == (0,)
