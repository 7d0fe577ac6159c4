"""The critic's model, its loss, and the origin of its weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2ForSequenceClassification

from rollmesh.algorithms.statistics import explained_variance
from rollmesh.errors import ConfigError
from rollmesh.models.rows import Batching
from rollmesh.models.values import ValueModel
from services.config import MeshConfig
from services.learner.batching import TokenColumns, empty_micro_batch, pack, plan_layouts
from services.learner.critic import load_critic, value_loss
from services.learner.experience import build_experience
from tests.unit.learner.samples import mesh_config, random_groups, write_tiny_model

CPU = torch.device("cpu")


def _load(config: MeshConfig) -> ValueModel:
    return load_critic(config.learner, config.model, config.run.seed, CPU)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("policy"))


def _config(policy: Path, folder: Path, critic: Path | None = None, **learner: Any) -> MeshConfig:
    section = {"dtype": "float32", "device": "cpu", "critic": {"model_path": critic and str(critic)}, **learner}
    return mesh_config(policy, folder, learner=section, algorithm={"type": "ppo"})


def _reward_model(policy: Path, folder: Path, num_labels: int = 1) -> Qwen2ForSequenceClassification:
    torch.manual_seed(5)
    model = Qwen2ForSequenceClassification.from_pretrained(
        policy, num_labels=num_labels, pad_token_id=0, dtype=torch.float32
    )
    torch.nn.init.normal_(model.score.weight, std=0.5)
    model.save_pretrained(folder)
    return model.eval()


def _columns(count: int, **columns: torch.Tensor) -> TokenColumns:
    nothing = torch.zeros(count)
    return TokenColumns(nothing, nothing, nothing.double(), nothing.long(), **columns)


def test_a_fresh_head_is_small_and_the_same_on_every_rank(policy: Path, tmp_path: Path) -> None:
    heads = []
    for seed in (1, 2):
        torch.manual_seed(seed)  # as after other random draws
        heads.append(_load(_config(policy, tmp_path)).head.weight.detach())
    assert torch.equal(*heads)
    assert heads[0].shape == (1, 64)
    assert heads[0].std().item() == pytest.approx(1 / 65, rel=0.3)


def test_a_reward_models_head_is_kept_and_its_values_are_the_rewards(policy: Path, tmp_path: Path) -> None:
    reward_model = _reward_model(policy, tmp_path / "reward")
    model = _load(_config(policy, tmp_path, tmp_path / "reward"))
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        (values,) = model(ids, torch.arange(5)[None], torch.tensor([4]), torch.tensor([0]))
        reward = reward_model(input_ids=ids).logits[0]
    torch.testing.assert_close(values, reward, atol=1e-5, rtol=0)


def test_the_head_may_have_the_name_that_the_folder_says(policy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "reward"
    weight = _reward_model(policy, folder).score.weight.detach()
    tensors = load_file(folder / "model.safetensors")
    tensors["value_head.weight"] = tensors.pop("score.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**json.loads((folder / "config.json").read_text()), "value_head_prefix": "value_head"}
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(_load(_config(policy, tmp_path, folder)).head.weight.detach(), weight)


def test_a_reward_model_without_its_head_is_refused(policy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "reward"
    _reward_model(policy, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"learner\.critic\.model_path: .* is a reward model without a score\.weight"):
        _load(_config(policy, tmp_path, folder))


def test_a_folder_that_is_not_there_is_refused(policy: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"learner\.critic\.model_path: '.*absent' is not a folder"):
        _load(_config(policy, tmp_path, tmp_path / "absent"))


def test_a_head_of_several_numbers_is_refused(policy: Path, tmp_path: Path) -> None:
    _reward_model(policy, tmp_path / "classes", num_labels=3)
    with pytest.raises(ConfigError, match=r"has shape \(3, 64\), not \(1, 64\)"):
        _load(_config(policy, tmp_path, tmp_path / "classes"))


@pytest.mark.parametrize("batching", [each for each in Batching if each.is_packed])
def test_packed_values_equal_those_of_each_sequence_alone(policy: Path, tmp_path: Path, batching: Batching) -> None:
    _reward_model(policy, tmp_path / "reward")
    model = _load(_config(policy, tmp_path, tmp_path / "reward"))
    experience = build_experience([random_groups(3, 4, lengths=(1, 30))], False)
    sequences, columns = experience.sequences, _columns(experience.num_tokens)
    packed, alone = torch.zeros(experience.num_tokens), []
    with torch.no_grad():
        for layout in plan_layouts([len(s.token_ids) for s in sequences], 200, batching):
            batch = pack(sequences, experience.sequence_starts, layout, columns, batching)
            inputs = (batch.input_ids, batch.position_ids, batch.predictors, batch.targets, batch.boundaries)
            packed[batch.places] = model(*inputs)[0]
        for sequence in sequences:
            hidden = model.backbone(input_ids=torch.from_numpy(sequence.token_ids.astype("int64"))[None])
            states = hidden.last_hidden_state[0, torch.from_numpy(sequence.positions.astype("int64")) - 1]
            alone.append(states @ model.head.weight[0])
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=0)


def test_values_of_bfloat16_weights_are_float32(policy: Path, tmp_path: Path) -> None:
    model = _load(_config(policy, tmp_path, dtype="bfloat16"))
    (values,) = model(torch.tensor([[5, 6]]), torch.arange(2)[None], torch.tensor([0]), torch.tensor([6]))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert values.dtype == torch.float32


def test_the_loss_is_the_clipped_one_averaged_over_the_tokens_of_the_whole_step() -> None:
    """V = 2, V_old = 1, G = 1.2 and c = 0.5 give 0.32. V = V_old = 0 and G = 1 give 0.5."""
    values = torch.tensor([2.0, 0.0], requires_grad=True)
    columns = _columns(2, values=torch.tensor([1.0, 0.0]), returns=torch.tensor([1.2, 1.0]))
    batch = replace(empty_micro_batch(columns), columns=columns)
    loss, sums = value_loss(values, batch, 10.0, 0.5)
    assert loss.item() == pytest.approx((0.32 + 0.5) / 10)
    assert sums[0].item() == pytest.approx(loss.item())
    assert sums[1].item() == 2.0
    assert explained_variance(sums[2:]) == pytest.approx(1 - 0.81 / 0.01)
    loss.backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([0.08, -0.1])


def test_an_empty_micro_batch_has_gradients_of_exactly_0(policy: Path, tmp_path: Path) -> None:
    model = _load(_config(policy, tmp_path))
    batch = empty_micro_batch(_columns(4, values=torch.ones(4), returns=torch.ones(4)))
    (values,) = model(batch.input_ids, batch.position_ids, batch.predictors, batch.targets)
    loss, sums = value_loss(values, batch, 10.0, 0.5)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.abs().max() == 0 for gradient in gradients)
    assert sums.abs().max() == 0
