"""Policy losses and the critic's, their values and gradients, against the slow implementation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollmesh.algorithms.aggregate import weighted_sum
from rollmesh.algorithms.losses import POLICY_LOSSES, Clip
from rollmesh.algorithms.losses.value import clipped_value_loss
from tests.unit.algorithms import slow
from tests.unit.algorithms.batches import dtypes, eighths, examples, logprobs, seeds, segments

lengths_of_sequences = st.lists(st.integers(0, 6), min_size=1, max_size=6)
clips = st.builds(
    Clip,
    low=st.sampled_from([None, 0.2, 3e-4]),
    high=st.sampled_from([None, 0.28, 4e-4]),
    dual=st.sampled_from([None, 3.0]),
)
kinds = st.sampled_from(sorted(POLICY_LOSSES))


def _slow_clip(clip: Clip) -> slow.Clip:
    return slow.Clip(clip.low, clip.high, clip.dual)


@examples(200)
@given(kinds, lengths_of_sequences, seeds, clips, dtypes)
def test_every_policy_loss_and_what_it_clips_is_the_slow_one(
    kind: str, lengths: list[int], seed: int, clip: Clip, dtype: torch.dtype
) -> None:
    generator, count = np.random.default_rng(seed), sum(lengths)
    current, anchor = logprobs(generator, count), logprobs(generator, count)
    advantages = eighths(generator, count)
    tensors = (torch.tensor(values, dtype=dtype) for values in (current, anchor, advantages))
    result = POLICY_LOSSES[kind](*tensors, segments(lengths), clip)
    expected = slow.policy_losses(kind, current, anchor, advantages, lengths, _slow_clip(clip))
    precision = 1e-5 if dtype == torch.float32 else 1e-9
    assert result.loss.tolist() == pytest.approx([x.loss for x in expected], rel=precision, abs=precision)
    assert result.ratio.tolist() == pytest.approx([x.ratio for x in expected], rel=precision, abs=precision)
    assert result.is_clipped_low.tolist() == [x.is_low for x in expected]
    assert result.is_clipped_high.tolist() == [x.is_high for x in expected]
    assert not result.ratio.requires_grad


@examples(100)
@given(kinds, lengths_of_sequences, seeds, clips)
def test_gradients_of_policy_losses_are_the_differences_of_the_slow_ones(
    kind: str, lengths: list[int], seed: int, clip: Clip
) -> None:
    generator, count = np.random.default_rng(seed), sum(lengths)
    near = -np.round(generator.random((2, count)) * 128) / 64
    current, anchor = near[0].tolist(), near[1].tolist()
    advantages, weights = eighths(generator, count), generator.random(count).tolist()

    def total(moved: list[float]) -> float:
        parts = slow.policy_losses(kind, moved, anchor, advantages, lengths, _slow_clip(clip), fixed=current)
        return math.fsum(w * part.loss for w, part in zip(weights, parts, strict=True))

    leaf = torch.tensor(current, dtype=torch.float64, requires_grad=True)
    others = (torch.tensor(values, dtype=torch.float64) for values in (anchor, advantages))
    loss = weighted_sum(
        POLICY_LOSSES[kind](leaf, *others, segments(lengths), clip).loss, torch.tensor(weights, dtype=torch.float64)
    )
    (found,) = torch.autograd.grad(loss, leaf)
    assert found.tolist() == pytest.approx(slow.gradient(total, current), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", sorted(POLICY_LOSSES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_absurd_log_ratios_give_finite_losses_and_gradients(kind: str, dtype: torch.dtype) -> None:
    leaf = torch.tensor([0.0, -1e4, 0.0, -1e4], dtype=dtype, requires_grad=True)
    anchor = torch.tensor([-1e4, 0.0, -1e4, 0.0], dtype=dtype)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=dtype)
    for clip in (Clip(), Clip(None, None)):
        result = POLICY_LOSSES[kind](leaf, anchor, advantages, segments([1, 1, 2]), clip)
        (gradient,) = torch.autograd.grad(result.loss.sum(), leaf)
        assert result.loss.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", sorted(POLICY_LOSSES))
def test_a_token_that_cannot_happen_touches_nothing_once_its_weight_is_0(kind: str) -> None:
    leaf = torch.tensor([-1.0, -math.inf, -2.0], requires_grad=True)
    anchor = torch.tensor([-1.1, -0.5, -math.inf])
    result = POLICY_LOSSES[kind](leaf, anchor, torch.tensor([1.0, -1.0, 1.0]), segments([1, 1, 1]), Clip())
    total = weighted_sum(result.loss, torch.tensor([1.0, 0.0, 0.0]))
    (gradient,) = torch.autograd.grad(total, leaf)
    assert total.item() == result.loss[0].item()
    assert gradient[0] != 0
    assert gradient[1:].tolist() == [0.0, 0.0]


def test_the_gradient_stops_where_a_limit_is_passed_and_each_side_is_counted() -> None:
    leaf = torch.tensor([0.5, -0.5, 0.5, -0.5, 2.0], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0])
    result = POLICY_LOSSES["ppo"](leaf, torch.zeros(5), advantages, segments([5]), Clip(0.2, 0.28, dual=3.0))
    (gradient,) = torch.autograd.grad(result.loss.sum(), leaf)
    assert (gradient == 0).tolist() == [True, True, False, False, True]
    assert result.is_clipped_high.tolist() == [True, False, False, False, True]
    assert result.is_clipped_low.tolist() == [False, True, False, False, False]


def test_cispo_keeps_the_gradient_of_a_clipped_token_with_a_bounded_weight() -> None:
    leaf = torch.tensor([-0.1, -3.0], requires_grad=True)
    result = POLICY_LOSSES["cispo"](leaf, torch.tensor([-9.0, -0.5]), torch.ones(2), segments([2]), Clip(0.9, 4.0))
    (gradient,) = torch.autograd.grad(result.loss.sum(), leaf)
    assert gradient.tolist() == pytest.approx([-5.0, -0.1])


def test_on_policy_the_gradients_of_all_losses_are_that_of_the_plain_policy_gradient() -> None:
    advantages = torch.tensor([0.7, 0.7, -1.3])
    for kind, loss in POLICY_LOSSES.items():
        leaf = torch.tensor([-0.5, -1.0, -2.0], requires_grad=True)
        result = loss(leaf, leaf.detach(), advantages, segments([2, 1]), Clip())
        (gradient,) = torch.autograd.grad(result.loss.sum(), leaf)
        torch.testing.assert_close(gradient, -advantages, msg=lambda text, kind=kind: f"{kind}: {text}")


@examples(100)
@given(st.integers(1, 12), seeds, st.sampled_from([0.2, 0.5]))
def test_the_critics_loss_and_gradient_are_the_slow_ones(count: int, seed: int, clip: float) -> None:
    generator = np.random.default_rng(seed)
    values, old, returns = generator.normal(size=(3, count))

    def total(moved: list[float]) -> float:
        triples = zip(moved, old, returns, strict=True)
        return math.fsum(slow.value_loss(value, before, target, clip) for value, before, target in triples)

    leaf = torch.tensor(values, requires_grad=True)
    loss = clipped_value_loss(leaf, torch.tensor(old), torch.tensor(returns), clip).sum()
    (found,) = torch.autograd.grad(loss, leaf)
    assert loss.item() == pytest.approx(total(values.tolist()))
    assert found.tolist() == pytest.approx(slow.gradient(total, values.tolist()), rel=1e-4, abs=1e-5)
