"""The frozen policy against Hugging Face's own forward pass, and the folders it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from rollmesh.errors import ConfigError
from rollmesh.types import Float32Array
from services.reference.model import FrozenPolicy, LogProbJob, choose_device
from tests.unit.reference.conftest import VOCAB_SIZE


def load(path: Path, dtype: str = "float32") -> FrozenPolicy:
    return FrozenPolicy.load(path, dtype=dtype, device="cpu", place="model.path")


def random_jobs(count: int, seed: int = 0, max_length: int = 60) -> list[LogProbJob]:
    random = np.random.default_rng(seed)
    jobs = []
    for _ in range(count):
        length = int(random.integers(2, max_length))
        num_prompt_tokens = int(random.integers(1, length))
        token_ids = random.integers(0, VOCAB_SIZE, length).astype(np.int32)
        jobs.append(LogProbJob(token_ids, num_prompt_tokens, float(random.choice([0.5, 1.0, 1.3]))))
    return jobs


def expected_logprobs(path: Path, job: LogProbJob) -> Float32Array:
    """Compute the log-probabilities by definition: one sequence, all positions, no mask, the model's own attention."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(job.token_ids.astype(np.int64))[None]).logits[0, :-1].double()
    every = torch.log_softmax(logits / job.temperature, dim=-1)
    picked = every.gather(1, torch.from_numpy(job.token_ids[1:].astype(np.int64))[:, None])[:, 0]
    return picked[job.num_prompt_tokens - 1 :].numpy().astype(np.float32)


def test_any_batch_gives_what_each_sequence_gives_alone(any_model_path: Path) -> None:
    policy, jobs = load(any_model_path), random_jobs(9)
    expected = [expected_logprobs(any_model_path, job) for job in jobs]
    for start, end in ((0, 9), (0, 1), (1, 4), (4, 9)):
        for logprobs, wanted in zip(policy.compute_logprobs(jobs[start:end]), expected[start:end], strict=True):
            assert logprobs.dtype == np.float32
            np.testing.assert_allclose(logprobs, wanted, atol=1e-5, rtol=1e-5)


def test_bfloat16_is_near_float32_and_its_answers_are_float32(model_path: Path) -> None:
    jobs = random_jobs(4)
    rough, exact = load(model_path, "bfloat16").compute_logprobs(jobs), load(model_path).compute_logprobs(jobs)
    assert rough[0].dtype == np.float32
    assert 0 < max(float(np.abs(a - b).max()) for a, b in zip(rough, exact, strict=True)) < 0.5


def test_the_weights_cannot_be_trained(model_path: Path) -> None:
    policy = load(model_path)
    assert not policy._model.training
    assert not any(parameter.requires_grad for parameter in policy._model.parameters())


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path)
    return str(caught.value)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "absent")
    assert "has no config.json" in refusal(tmp_path)


def test_a_broken_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert "config.json is not JSON" in refusal(tmp_path)


def test_a_model_that_is_no_causal_lm_is_refused(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=20, **small)).save_pretrained(tmp_path / "bert")
    T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=16, num_layers=1, num_heads=1, d_ff=16)).save_pretrained(
        tmp_path / "t5"
    )
    assert "holds a BertForMaskedLM; name the folder of a causal language model" in refusal(tmp_path / "bert")
    assert "holds a T5ForConditionalGeneration" in refusal(tmp_path / "t5")


def test_a_folder_without_weights_is_refused(model_path: Path, tmp_path: Path) -> None:
    shutil.copy(model_path / "config.json", tmp_path)
    assert "cannot be loaded" in refusal(tmp_path)


def test_missing_or_unreadable_weights_are_refused_and_not_made_up(model_path: Path, tmp_path: Path) -> None:
    shutil.copytree(model_path, tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    assert "lacks 1 weights of Qwen2ForCausalLM (first: model.layers.1.mlp.up_proj.weight)" in refusal(file.parent)
    file.write_bytes(b"not safetensors")
    assert "cannot be loaded" in refusal(file.parent)


def test_weights_of_another_shape_are_refused(model_path: Path, tmp_path: Path) -> None:
    shutil.copytree(model_path, tmp_path / "copy")
    file = tmp_path / "copy" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"intermediate_size": 96}))
    assert "cannot be loaded" in refusal(file.parent)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_is_refused_where_there_is_none_and_auto_takes_the_cpu() -> None:
    with pytest.raises(ConfigError, match="no CUDA device"):
        choose_device("cuda")
    assert choose_device("auto").type == "cpu"
