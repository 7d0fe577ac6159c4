"""Many architectures: batches as the learner makes them equal single passes, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rollmesh.models.rows import Batching
from services.learner.batching import TokenColumns, pack, plan_layouts
from services.learner.experience import Experience, build_experience
from services.learner.policy import PolicyModel
from tests.unit.learner.samples import random_groups
from tests.unit.models.architectures import ARCHITECTURES
from tests.unit.models.table import examined, table, written_table

EXPERIENCE = build_experience([random_groups(2, 3, lengths=(1, 20))], needs_reference=False)
TOKENS_PER_MICRO_BATCH = 80


def _batched(policy: PolicyModel, experience: Experience, batching: Batching) -> Tensor:
    """Log-probabilities of all generated tokens, by way of the learner's micro-batches."""
    sequences, nothing = experience.sequences, torch.zeros(experience.num_tokens)
    columns = TokenColumns(nothing, nothing, nothing.double(), nothing.long())
    found = nothing.clone()
    for layout in plan_layouts([len(s.token_ids) for s in sequences], TOKENS_PER_MICRO_BATCH, batching):
        batch = pack(sequences, experience.sequence_starts, layout, columns, batching)
        logprobs = policy(batch.input_ids, batch.position_ids, batch.predictors, batch.targets, batch.boundaries)[0]
        found = found.index_put((batch.places,), logprobs)
    return found


def _alone(policy: PolicyModel, experience: Experience) -> Tensor:
    """The same by definition: one sequence a pass, all logits, nothing said of positions."""
    found = []
    for sequence in experience.sequences:
        ids = torch.from_numpy(sequence.token_ids.astype("int64"))
        positions = torch.from_numpy(sequence.positions.astype("int64"))
        logits = policy.causal_lm(input_ids=ids[None], use_cache=False).logits[0]
        found.append(logits.log_softmax(-1)[positions - 1, ids[positions]])
    return torch.cat(found)


def _gradient(policy: PolicyModel, outputs: Tensor) -> Tensor:
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    weights = torch.linspace(-1, 1, len(outputs))
    found = torch.autograd.grad((outputs * weights).sum(), parameters, allow_unused=True)
    return torch.cat([gradient.flatten() for gradient in found if gradient is not None])


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_batches_equal_single_passes(architecture: str) -> None:
    policy, batching = examined(architecture)
    alone = _alone(policy, EXPERIENCE)
    expected = _gradient(policy, alone)
    for way in {batching, Batching.PADDED}:
        together = _batched(policy, EXPERIENCE, way)
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
        gradient = _gradient(policy, together)
        assert (gradient - expected).norm() < 1e-4 * expected.norm()


def test_the_documented_table_is_what_the_architectures_end_with() -> None:
    assert written_table() == table(), "run python -m tests.unit.models.table"


def test_architectures_of_both_kinds_are_among_them() -> None:
    found = {architecture: examined(architecture)[1] for architecture in ARCHITECTURES}
    assert len(found) >= 25
    assert {found[name] for name in ("llama", "gemma2", "qwen3_moe", "gpt2")} == {Batching.PACKED}
    assert {found[name] for name in ("qwen3_next", "mamba", "lfm2", "opt", "bloom")} == {Batching.PADDED}
