"""The critic in the real DeepSpeed on one rank, beside the policy's engine in the same process.

The tests of the policy's average also cover the critic on two ranks, and its checkpoint.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from services.config import MeshConfig
from services.learner.batching import MicroBatch, TokenColumns, empty_micro_batch, pack, plan_layouts
from services.learner.composition import load_critic_engine, load_policy
from services.learner.critic import CriticEngine, load_critic
from services.learner.engine import PolicyEngine
from services.learner.experience import build_experience
from services.learner.ranks import Ranks
from tests.unit.learner.samples import mesh_config, random_groups, write_tiny_model

pytestmark = pytest.mark.engine

NUM_STEPS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def _config(model: Path, folder: Path, **learner: Any) -> MeshConfig:
    section = {"dtype": "float32", "device": "cpu", **learner}
    return mesh_config(model, folder, learner=section, algorithm={"type": "ppo"})


def _batches(budget: int, num_empty: int = 0) -> tuple[list[MicroBatch], int]:
    """Return the micro-batches of one step, with old values and returns, and the step's number of generated tokens."""
    experience = build_experience([random_groups(4, 4)], False)
    count = experience.num_tokens
    generator = torch.Generator().manual_seed(0)
    columns = TokenColumns(
        behaviour=torch.full((count,), -4.0),
        advantages=torch.randn(count, generator=generator),
        loss_weights=torch.full((count,), 1 / count, dtype=torch.float64),
        versions_apart=torch.zeros(count, dtype=torch.int64),
        values=0.1 * torch.randn(count, generator=generator),
        returns=torch.rand(count, generator=generator),
    )
    sequences, starts = experience.sequences, experience.sequence_starts
    layouts = plan_layouts([len(sequence.token_ids) for sequence in sequences], budget)
    batches = [pack(sequences, starts, layout, columns) for layout in layouts]
    return [*batches, *[empty_micro_batch(columns)] * num_empty], count


def _policy_loss(outputs: tuple[Tensor, ...], batch: MicroBatch) -> tuple[Tensor, Tensor]:
    loss = -(outputs[0] * batch.columns.advantages * batch.columns.loss_weights.float()).sum()
    return loss, loss.detach().double()[None]


def _train_policy(engine: PolicyEngine, batches: list[MicroBatch]) -> tuple[float, float]:
    sums, norm = engine.train(batches, len(batches), _policy_loss, 1, 1e-3)
    return sums[0].item(), norm


def _train_critic(engine: CriticEngine, batches: list[MicroBatch], num_tokens: int) -> tuple[float, float]:
    sums, norm = engine.train(batches, len(batches), num_tokens, 1e-3)
    return sums[0].item(), norm


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_policy_and_critic_do_not_disturb_each_other(
    model: Path, tmp_path: Path, ranks: Ranks, zero_stage: int, dtype: str
) -> None:
    """Trained in turns, with different numbers of passes, policy and critic give the same numbers as each alone."""
    config = _config(model, tmp_path, zero_stage=zero_stage, dtype=dtype)
    (many, num_tokens), (few, _) = _batches(128), _batches(4096)
    assert len(many) > len(few)
    alone = load_policy(config, ranks)
    expected_policy = [_train_policy(alone, few) for _ in range(NUM_STEPS)]
    alone_critic = load_critic_engine(config, ranks)
    expected_critic = [_train_critic(alone_critic, many, num_tokens) for _ in range(NUM_STEPS)]

    policy, critic = load_policy(config, ranks), load_critic_engine(config, ranks)
    for step in range(NUM_STEPS):
        values = critic.values(many[0])
        assert values.dtype == torch.float32
        assert not values.requires_grad
        assert _train_critic(critic, many, num_tokens) == pytest.approx(expected_critic[step], rel=1e-6)
        assert policy.logprobs(few[0]).dtype == torch.float32
        assert _train_policy(policy, few) == pytest.approx(expected_policy[step], rel=1e-6)


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_step_is_the_same_in_one_micro_batch_and_in_many_some_of_them_empty(
    model: Path, tmp_path: Path, ranks: Ranks, zero_stage: int
) -> None:
    results = []
    for budget, num_empty in ((4096, 0), (128, 2)):
        batches, num_tokens = _batches(budget, num_empty)
        critic = load_critic_engine(_config(model, tmp_path, zero_stage=zero_stage), ranks)
        steps = [_train_critic(critic, batches, num_tokens) for _ in range(NUM_STEPS)]
        results.append(torch.tensor(steps))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


def test_a_step_is_that_of_a_plain_loop(model: Path, tmp_path: Path, ranks: Ranks) -> None:
    """The plain loop uses no DeepSpeed, and has the loss written out."""
    config = _config(model, tmp_path, critic={"optimizer": {"lr": 1.0, "max_grad_norm": 0.1, "weight_decay": 0.1}})
    batches, num_tokens = _batches(4096)
    found = load_critic_engine(config, ranks)
    plain = load_critic(config.learner, config.model, config.run.seed, ranks.device)
    weights = dict(plain.named_parameters())
    groups = [
        {"params": [w for w in weights.values() if w.ndim > 1], "weight_decay": 0.1},
        {"params": [w for w in weights.values() if w.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    for _ in range(NUM_STEPS):
        total = torch.zeros(())
        for batch in batches:
            (values,) = plain(batch.input_ids, batch.position_ids, batch.predictors, batch.targets)
            old, returns = batch.columns.values, batch.columns.returns
            assert old is not None
            assert returns is not None
            near = torch.minimum(torch.maximum(values, old - 0.5), old + 0.5)
            total = total + 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2).sum() / num_tokens
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizer.step()
        assert _train_critic(found, batches, num_tokens) == pytest.approx((total.item(), norm.item()), rel=1e-3)
    with torch.no_grad():
        expected = plain(batches[0].input_ids, batches[0].position_ids, batches[0].predictors, batches[0].targets)[0]
    torch.testing.assert_close(found.values(batches[0]), expected, atol=1e-4, rtol=0)


def test_the_critic_learns_what_its_returns_say_as_far_as_the_clip_lets_it(
    model: Path, tmp_path: Path, ranks: Ranks
) -> None:
    batches, num_tokens = _batches(4096)
    returns = batches[0].columns.behaviour  # -4 for every token
    lasts = []
    for old in (returns, torch.zeros_like(returns)):
        learnt = [replace(b, columns=replace(b.columns, values=old, returns=returns)) for b in batches]
        critic = load_critic_engine(_config(model, tmp_path, gradient_checkpointing=True), ranks)
        losses = [_train_critic(critic, learnt, num_tokens)[0] for _ in range(30)]
        assert losses[0] == pytest.approx(8.0, rel=0.1)  # (0 - (-4))² / 2
        lasts.append(losses[-1])
    assert lasts[0] < 4.0
    assert lasts[1] == pytest.approx(6.125)  # (-0.5 - (-4))² / 2
