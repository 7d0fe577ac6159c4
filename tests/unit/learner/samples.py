"""Made-up groups, a tiny model folder, and a configuration for that model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rollmesh.types import Group, PolicyVersion, PromptId, Sample, Score, StopReason, Turn, VersionSpan
from services.config import MeshConfig

VOCABULARY = 64


def sample(
    index: int = 0,
    *,
    prompt: Sequence[int] = (5, 6, 7),
    response: Sequence[int] = (8, 9, 10),
    turns: Sequence[tuple[int, int]] | None = None,
    behaviour: Sequence[float] | None = None,
    reference: Sequence[float] | None = None,
    reward: float | None = 1.0,
    version: int | PolicyVersion = 0,
    stop: StopReason = StopReason.STOP,
    prompt_index: int = 0,
) -> Sample:
    """Return a sample. By default a single turn generated the whole response."""
    version = PolicyVersion(0, version) if isinstance(version, int) else version
    prompt_id = PromptId("train", 0, prompt_index)
    shape = turns if turns is not None else [(len(response), 0)]
    num_generated = sum(generated for generated, _ in shape)
    return Sample(
        sample_id=f"{prompt_id}/{index}/0",
        index=index,
        prompt_id=prompt_id,
        prompt_token_ids=np.array(prompt, dtype=np.int32),
        response_token_ids=np.array(response, dtype=np.int32),
        turns=tuple(Turn(generated, environment, stop) for generated, environment in shape),
        behaviour_logprobs=np.array(behaviour if behaviour is not None else [-4.0] * num_generated, dtype=np.float32),
        version_spans=(VersionSpan(version, 0, num_generated),) if num_generated else (),
        score=None if reward is None else Score(reward, reward),
        reference_logprobs=None if reference is None else np.array(reference, dtype=np.float32),
    )


def group(samples: Sequence[Sample], prompt_index: int = 0) -> Group:
    prompt_id = PromptId("train", 0, prompt_index)
    return Group(str(prompt_id), prompt_id, prompt_index, 0, tuple(samples))


def random_groups(
    num_groups: int,
    num_samples: int,
    seed: int = 0,
    *,
    first_prompt: int = 0,
    version: int | PolicyVersion = 0,
    has_reference: bool = False,
    lengths: tuple[int, int] = (2, 30),
) -> list[Group]:
    """Return groups of random tokens, lengths and rewards.

    Their behaviour log-probabilities are near those of a random policy. ``lengths`` are the shortest response, and one
    more than the longest response.
    """
    generator = np.random.default_rng(seed)
    groups = []
    for prompt_index in range(first_prompt, first_prompt + num_groups):
        prompt = generator.integers(3, VOCABULARY, generator.integers(3, 12))
        samples = []
        for index in range(num_samples):
            length = int(generator.integers(*lengths))
            samples.append(
                sample(
                    index,
                    prompt=prompt.tolist(),
                    response=generator.integers(3, VOCABULARY, length).tolist(),
                    behaviour=(-4.2 + 0.3 * generator.standard_normal(length)).tolist(),
                    reference=(-4.2 + 0.3 * generator.standard_normal(length)).tolist() if has_reference else None,
                    reward=float(generator.integers(0, 2)),
                    version=version,
                    prompt_index=prompt_index,
                )
            )
        groups.append(group(samples, prompt_index))
    return groups


def mesh_config(model: Path, directory: Path, **sections: dict[str, Any]) -> MeshConfig:
    """Return a configuration for the tiny model, in float32 on the CPU. ``sections`` replace its settings."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"name": "learner-test", "directory": str(directory)},
        "model": {"path": str(model), "max_length": 128},
        "data": {"path": str(directory / "train.jsonl")},
        "training": {"steps": 20, "prompts_per_step": 4, "samples_per_prompt": 4, "max_staleness": 1},
        "sampling": {"max_new_tokens": 64},
        "reward": {"function": str(directory / "reward_func.py")},
        # No policy has the behaviour log-probabilities of made-up samples, so parity is off.
        "learner": {"dtype": "float32", "device": "cpu", "parity": "off", "optimizer": {"lr": 1e-3}},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return MeshConfig.model_validate(tree)


def write_tiny_model(folder: Path, *, is_tied: bool = True) -> Path:
    """Write a Qwen2 of some 100,000 parameters with a word-level tokenizer. Return its folder."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(7)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=256,
        tie_word_embeddings=is_tied,
        initializer_range=0.1,
        attention_dropout=0.1,
        bos_token_id=1,
        eos_token_id=2,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{str(n): n for n in range(3, VOCABULARY)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)
    return folder
