"""The policy in the real DeepSpeed on one rank computes the same, however the batch is cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollmesh.errors import ConfigError
from rollmesh.models.rows import Batching
from rollmesh.types import Group, PolicyVersion, Sample
from services.config import MeshConfig
from services.learner.batching import TokenColumns, pack, plan_layouts
from services.learner.checkpoint import CheckpointStore, Learnables
from services.learner.composition import build_checkpoint_store, build_trainer, load_learnables, load_policy
from services.learner.engine import PolicyEngine
from services.learner.experience import build_experience
from services.learner.metrics import StepStatistics
from services.learner.ranks import Ranks
from tests.integration.tiny_model import make_tiny_mixture
from tests.unit.learner.samples import mesh_config, random_groups, write_tiny_model
from tests.unit.models.architectures import make_model

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def _train(config: MeshConfig, ranks: Ranks, batches: list[list[Group]]) -> tuple[PolicyEngine, list[StepStatistics]]:
    engine = load_policy(config, ranks)
    trainer = build_trainer(config, Learnables(engine), ranks, num_batches=20)
    return engine, [trainer.train([groups], step, 0) for step, groups in enumerate(batches, start=1)]


def _weights(engine: PolicyEngine) -> dict[str, torch.Tensor]:
    with engine.whole(spec.name for spec in engine.tensor_specs()) as tensors:
        return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batching", [each for each in Batching if each.is_packed])
def test_packed_logprobs_equal_those_of_each_sequence_alone(
    model: Path, tmp_path: Path, ranks: Ranks, attention: str, batching: Batching
) -> None:
    config = mesh_config(model, tmp_path, learner={"attention": attention}, sampling={"temperature": 0.8})
    engine = load_policy(config, ranks)
    experience = build_experience([random_groups(5, 4, lengths=(1, 30))], False)
    sequences, nothing = experience.sequences, torch.zeros(experience.num_tokens)
    columns = TokenColumns(nothing, nothing, nothing.double(), nothing.long())
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for layout in plan_layouts([len(s.token_ids) for s in sequences], 300, batching):
        packed = engine.logprobs(pack(sequences, experience.sequence_starts, layout, columns, batching))
        alone = []
        for index in (index for row in layout for index in row):
            sequence = sequences[index]
            ids = torch.from_numpy(sequence.token_ids.astype("int64"))
            with torch.no_grad():
                logits = plain(ids[None]).logits[0]
            positions = torch.from_numpy(sequence.positions.astype("int64"))
            scaled = torch.log_softmax(logits[positions - 1].float() / 0.8, -1)
            alone.append(scaled.gather(-1, ids[positions, None])[:, 0])
        torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=0)


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
@pytest.mark.parametrize("correction", ["none", "tis"])
def test_one_step_is_the_same_in_one_micro_batch_and_in_many(
    model: Path, tmp_path: Path, ranks: Ranks, zero_stage: int, correction: str
) -> None:
    groups = random_groups(4, 4)
    updated = []
    for budget in (4096, 128):
        config = mesh_config(
            model,
            tmp_path,
            # With this large epsilon, AdamW's first step is proportional to the gradient.
            learner={
                "zero_stage": zero_stage,
                "tokens_per_micro_batch": budget,
                "optimizer": {"lr": 1.0, "eps": 1.0},
            },
            algorithm={"correction": {"type": correction}},
        )
        engine, (statistics,) = _train(config, ranks, [groups])
        updated.append((_weights(engine), statistics))
    (whole, one), (parts, many) = updated
    num_passes = len(plan_layouts([s.num_tokens for g in groups for s in g.samples], 128))
    assert num_passes >= 3
    assert many.loss == pytest.approx(one.loss, abs=1e-6)
    assert many.metrics["optimizer/grad_norm"] == pytest.approx(one.metrics["optimizer/grad_norm"], rel=1e-5)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, atol=1e-5, rtol=0)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_a_model_that_lets_packed_sequences_see_each_other_trains_on_its_own_probabilities(
    tmp_path: Path, ranks: Ranks, zero_stage: int
) -> None:
    """OPT's mask fits one sequence. The behaviour log-probabilities come from single passes, so all ratios are 1."""
    plain = make_model("opt")
    plain.save_pretrained(tmp_path)
    groups = [
        replace(group, samples=tuple(_with_logprobs_of(plain, sample) for sample in group.samples))
        for group in random_groups(2, 3)
    ]
    _, (statistics,) = _train(mesh_config(tmp_path, tmp_path, learner={"zero_stage": zero_stage}), ranks, [groups])
    assert statistics.metrics["importance/effective_share"] == pytest.approx(1.0, abs=1e-9)
    assert statistics.metrics["policy/kl_behaviour"] == pytest.approx(0.0, abs=1e-5)


def _with_logprobs_of(model: Any, sample: Sample) -> Sample:
    """Return a sample of one turn, with the model's log-probabilities as its behaviour log-probabilities."""
    prompt, response = (
        torch.from_numpy(ids.astype("int64")) for ids in (sample.prompt_token_ids, sample.response_token_ids)
    )
    with torch.no_grad():
        logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
    logprobs = logits.log_softmax(-1).gather(-1, response[:, None])[:, 0]
    return replace(sample, behaviour_logprobs=logprobs.numpy())


def test_a_step_is_that_of_a_plain_loop_over_padded_samples(model: Path, tmp_path: Path, ranks: Ranks) -> None:
    """The plain loop is independent: no packing, no DeepSpeed, and of this project only the made-up batch."""
    groups = random_groups(4, 4)
    config = mesh_config(model, tmp_path, learner={"optimizer": {"lr": 1e-3, "weight_decay": 0.1}})
    engine, (statistics,) = _train(config, ranks, [groups])
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    plain.config.attention_dropout = 0.0
    decayed = [p for p in plain.parameters() if p.ndim > 1]
    others = [p for p in plain.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1e-3, betas=(0.9, 0.95)
    )
    num_tokens = sum(s.num_generated_tokens for g in groups for s in g.samples)
    total = torch.zeros(())
    for group in groups:
        rewards = torch.tensor([s.score.reward for s in group.samples if s.score], dtype=torch.float64)
        advantages = ((rewards - rewards.mean()) / (rewards.std() + 1e-9)).float()
        for sample, advantage in zip(group.samples, advantages, strict=True):
            prompt, response = torch.tensor(sample.prompt_token_ids), torch.tensor(sample.response_token_ids)
            ids = torch.cat([prompt, response]).long()
            logits = plain(ids[None]).logits[0, len(prompt) - 1 : -1]
            logprobs = torch.log_softmax(logits, -1).gather(-1, ids[len(prompt) :, None])[:, 0]
            ratio = torch.exp(logprobs - torch.tensor(sample.behaviour_logprobs))
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
            total = total - surrogate.sum() / num_tokens
    total.backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    optimizer.step()
    assert statistics.loss == pytest.approx(total.item(), abs=1e-5)
    assert statistics.metrics["optimizer/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    for name, tensor in plain.named_parameters():
        torch.testing.assert_close(_weights(engine)[name], tensor.data, atol=1e-4, rtol=0)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_gradient_checkpointing_changes_nothing(model: Path, tmp_path: Path, ranks: Ranks, zero_stage: int) -> None:
    groups = random_groups(4, 4)
    plain, saving = (
        _train(
            mesh_config(model, tmp_path, learner={"zero_stage": zero_stage, "gradient_checkpointing": is_on}),
            ranks,
            [groups] * 2,
        )[1]
        for is_on in (False, True)
    )
    for one, other in zip(plain, saving, strict=True):
        assert other.loss == pytest.approx(one.loss, abs=1e-6)
        assert other.metrics["optimizer/grad_norm"] == pytest.approx(one.metrics["optimizer/grad_norm"], rel=1e-5)


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_learning_rate_and_clipping_reach_the_optimiser(
    model: Path, tmp_path: Path, ranks: Ranks, zero_stage: int
) -> None:
    optimizer = {"lr": 1e-3, "warmup_steps": 10}
    config = mesh_config(model, tmp_path, learner={"zero_stage": zero_stage, "optimizer": optimizer})
    engine = load_policy(config, ranks)
    before = _weights(engine)
    statistics = build_trainer(config, Learnables(engine), ranks, 20).train([random_groups(2, 4)], 1, 0)
    moved = max((tensor - before[name]).abs().max().item() for name, tensor in _weights(engine).items())
    assert statistics.metrics["optimizer/lr"] == pytest.approx(1e-4)
    assert moved == pytest.approx(1e-4, rel=0.05)  # Adam's first step moves a weight by the learning rate


def test_weights_are_listed_as_the_checkpoint_stores_them(model: Path, tmp_path: Path, ranks: Ranks) -> None:
    tied = [spec.name for spec in load_policy(mesh_config(model, tmp_path), ranks).tensor_specs()]
    assert "model.embed_tokens.weight" in tied
    assert "lm_head.weight" not in tied
    untied = write_tiny_model(tmp_path / "untied", is_tied=False)
    specs = load_policy(mesh_config(untied, tmp_path, learner={"zero_stage": 3}), ranks).tensor_specs()
    assert "lm_head.weight" in [spec.name for spec in specs]
    assert {spec.name: spec.shape for spec in specs}["lm_head.weight"] == (64, 64)


def test_bfloat16_trains_and_keeps_its_master_weights_in_float32(model: Path, tmp_path: Path, ranks: Ranks) -> None:
    groups = random_groups(4, 4)
    exact = _train(mesh_config(model, tmp_path), ranks, [groups] * 4)[1]
    config = mesh_config(model, tmp_path, learner={"dtype": "bfloat16"})
    engine, rough = _train(config, ranks, [groups] * 4)
    assert {spec.dtype for spec in engine.tensor_specs()} == {"bfloat16"}
    for one, other in zip(exact, rough, strict=True):
        assert other.loss == pytest.approx(one.loss, abs=0.03)
    assert rough[-1].loss < rough[0].loss


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_a_checkpoint_resumes_to_the_same_losses_and_exports_a_model_that_transformers_loads(
    model: Path, tmp_path: Path, ranks: Ranks, zero_stage: int
) -> None:
    section = {"zero_stage": zero_stage, "checkpoint": {"max_kept": 2}}
    config = mesh_config(model, tmp_path, learner=section)
    batches = [random_groups(2, 4, seed=seed) for seed in range(6)]
    learnables = Learnables(load_policy(config, ranks))
    trainer, store = build_trainer(config, learnables, ranks, 20), build_checkpoint_store(config, ranks)
    losses = []
    for step, groups in enumerate(batches, start=1):
        losses.append(trainer.train([groups], step, 0).loss)
        if step <= 3:
            store.wait()
            store.save(learnables, trainer.state(), step, PolicyVersion(0, step), is_last=step == 3)
        if step == 3:
            weights = _weights(learnables.policy)
    store.wait()
    assert store.steps() == [2, 3]
    folders = sorted(path.name for path in config.run.folder.iterdir())
    assert folders == ["checkpoints", "export", "export-step-000002"]

    resumed = Learnables(load_policy(config, ranks))
    manifest = build_checkpoint_store(config, ranks).load(resumed, 3)
    assert (manifest.step, manifest.version, manifest.run) == (3, PolicyVersion(0, 3), "learner-test")
    assert (manifest.has_critic, manifest.has_average) == (False, False)
    again = build_trainer(config, resumed, ranks, 20)
    again.load_state(manifest.state)
    assert [again.train([groups], step, 0).loss for step, groups in enumerate(batches[3:], start=4)] == losses[3:]

    exported = AutoModelForCausalLM.from_pretrained(config.run.folder / "export", dtype="auto")
    for name, tensor in exported.named_parameters():
        assert torch.equal(tensor.data, weights[name])
    assert AutoTokenizer.from_pretrained(config.run.folder / "export").encode("5 6") == [5, 6]


def test_a_checkpoint_is_refused_where_it_does_not_fit(model: Path, tmp_path: Path, ranks: Ranks) -> None:
    def store_of(**learner: object) -> tuple[Learnables, CheckpointStore]:
        config = mesh_config(model, tmp_path, learner={"dtype": "float32", "device": "cpu", **learner})
        return load_learnables(config, ranks), build_checkpoint_store(config, ranks)

    plain, store = store_of()
    store.save(plain, {"kl_coef": 0.1}, 1, PolicyVersion(0, 1), is_last=False)
    store.wait()
    averaged, averaged_store = store_of(ema_beta=0.9)
    with pytest.raises(ConfigError, match=r"learner\.ema_beta: needs the average of the policy, which .* not hold"):
        averaged_store.load(averaged, 1)
    averaged_store.save(averaged, {"kl_coef": 0.1}, 2, PolicyVersion(0, 2), is_last=False)
    averaged_store.wait()
    with pytest.raises(ConfigError, match=r"learner\.ema_beta: makes no use of the average of the policy that"):
        store.load(plain, 2)
    with pytest.raises(ConfigError, match=r"learner\.zero_stage: 2 differs from the 0"):
        build_checkpoint_store(mesh_config(model, tmp_path, learner={"zero_stage": 2}), ranks).load(plain, 1)
    with pytest.raises(ConfigError, match="is not the manifest of a checkpoint"):
        store.load(plain, 3)
    manifest = tmp_path / "learner-test" / "checkpoints" / "step-000001" / "manifest.json"
    manifest.write_text('{"schema_version": 1}', encoding="utf-8")
    with pytest.raises(ConfigError, match="has schema 1, this version reads 2; use the version that wrote it"):
        store.load(plain, 1)


@pytest.mark.parametrize(("zero_stage", "is_saving"), [(0, True), (2, False), (3, False), (3, True)])
def test_the_experts_of_a_mixture_are_balanced_under_every_way_of_training(
    tmp_path: Path, ranks: Ranks, zero_stage: int, is_saving: bool
) -> None:
    mixture = tmp_path / "mixture"
    make_tiny_mixture(mixture)
    runs = []
    for stage, saving in ((0, False), (zero_stage, is_saving)):
        config = mesh_config(
            mixture,
            tmp_path,
            learner={"zero_stage": stage, "gradient_checkpointing": saving, "tokens_per_micro_batch": 160},
            algorithm={"aux_loss_coef": 10.0},
        )
        runs.append(_train(config, ranks, [random_groups(2, 4)] * 5)[1])
    for plain, other in zip(*runs, strict=True):
        assert other.loss == pytest.approx(plain.loss, rel=1e-4)
        assert other.metrics["optimizer/grad_norm"] == pytest.approx(plain.metrics["optimizer/grad_norm"], rel=1e-3)
    first, *_, last = (statistics.metrics["policy/aux_loss"] for statistics in runs[0])
    assert last < first - 0.01


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_experts_are_sent_and_exported_one_by_one_as_the_checkpoint_stores_them(
    tmp_path: Path, ranks: Ranks, zero_stage: int
) -> None:
    mixture = tmp_path / "mixture"
    make_tiny_mixture(mixture)
    stored = load_file(mixture / "model.safetensors")
    engine = load_policy(mesh_config(mixture, tmp_path, learner={"zero_stage": zero_stage}), ranks)

    assert {spec.name: spec.shape for spec in engine.checkpoint_specs} == {n: tuple(t.shape) for n, t in stored.items()}
    wanted = [f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in (0, 3)]
    with engine.checkpoint_tensors(wanted) as tensors:
        assert all(torch.equal(tensors[name], stored[name]) for name in wanted)
    engine.write_pretrained(tmp_path / "exported", engine.copy_weights())
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert exported.keys() == stored.keys()
    assert all(torch.equal(exported[name], stored[name]) for name in stored)
