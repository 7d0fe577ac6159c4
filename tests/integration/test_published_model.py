"""A model in the form in which models are published trains, goes to a real engine, and is exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tests.integration.mesh_runs import run_mesh

NUM_LAYERS = 2


def write_published_gpt2(folder: Path, vocabulary: Path) -> None:
    """Write a GPT-2 in the form of the published GPT-2: names without a prefix, and causal masks among the weights.

    The weights are in shards, beside a file with weights in another layout.
    """
    settings = json.loads((vocabulary / "config.json").read_text())
    tokens = {key: settings[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**tokens, n_positions=128, n_embd=64, n_layer=NUM_LAYERS, n_head=2))
    model.save_pretrained(folder, max_shard_size="100KB")
    for file in folder.glob("*.safetensors"):
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
        layers = [name.split(".")[1] for name in tensors if name.endswith("attn.c_attn.bias")]
        tensors |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 128, 128).tril() for layer in layers}
        save_file(tensors, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"transformer.', '"'))
    save_file({"tok_embeddings.weight": torch.zeros(2, 2)}, folder / "consolidated.safetensors")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(vocabulary / name, folder / name)


@pytest.mark.mesh
@pytest.mark.timeout(400)
def test_a_model_as_published_trains_and_its_export_loads(demo: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_published_gpt2(model, demo / "model")
    settings = [f"model.path={model}", "training.steps=2", "training.prompts_per_step=8", "evaluation=null"]
    reward = tmp_path / "reward.py"
    reward.write_text("def reward_func(queries, prompts, labels):\n    return {'rewards': [len(queries[0]) % 7 / 7]}\n")
    settings += [
        f"reward.function={reward}",
        "training.max_staleness=0",
        "algorithm.kl.coef=0",
        "learner.optimizer.warmup_steps=0",
    ]

    run = run_mesh(demo, tmp_path / "runs", "published", settings)

    assert all(line["policy/kl_behaviour"] < 1e-6 for line in run.lines("metrics.jsonl"))
    before, after = (
        AutoModelForCausalLM.from_pretrained(path, local_files_only=True) for path in (model, run.folder / "export")
    )
    changed = {name for name, tensor in before.named_parameters() if not torch.equal(tensor, after.get_parameter(name))}
    assert changed == {name for name, _ in before.named_parameters()}
    assert (run.folder / "export" / "generation_config.json").read_bytes() == (
        model / "generation_config.json"
    ).read_bytes()
