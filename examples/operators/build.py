"""Make the datasets, the tokenizer and the tiny model of the operators demo, and warm the model up.

::

    python examples/operators/build.py

writes ``data/train.jsonl``, ``data/heldout.jsonl`` and the folder ``model/`` beside this file, in about a minute on one
core. The warm-up is supervised training on a flawed teacher (`task.teacher_answer`). The model learns the arithmetic,
and the teacher's bad habit: it gives up after one wrong try. Reinforcement learning then teaches it to search on.

For that, the model has to know whether a try was right. It learns this suddenly, and the step differs between machines.
So the warm-up goes on until the model can tell.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from task import BOS, EOS, MAX_ANSWER_TOKENS, PAD, VOCABULARY, Problem, draw_problem, draw_problems, teacher_answer

PROMPT_TOKENS = 9
TOKENS_PER_STEP = 1200
PEAK_LR, FINAL_LR_RATIO, WARMUP_STEPS = 4e-3, 0.1, 20
MORE_STEPS, MOST_ROUNDS = 1000, 5
"""The steps by which the warm-up is prolonged if the model has not learnt verdicts yet; the most times of that."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each of the 64 words."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def build_model(tokenizer: PreTrainedTokenizerFast, *, is_tied: bool = True) -> Qwen3ForCausalLM:
    """Return a random model of the architecture Qwen3 with 128,000 parameters."""
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=is_tied,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def write_dataset(path: Path, problems: list[Problem]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"input": p.prompt, "label": str(p.target), "datasource": "operators"}) for p in problems]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def batches(rng: random.Random, tokenizer: PreTrainedTokenizerFast) -> Iterator[list[list[int]]]:
    """Yield batches of the teacher's answers to new problems, without end.

    A batch has at most `TOKENS_PER_STEP` tokens, in sequences of similar length.
    """
    ids = tokenizer.get_vocab()
    while True:
        pool = []
        while len(pool) < 384:
            problem = draw_problem(rng)
            if not problem.is_held_out:
                pool.append(taught(problem, rng, ids))
        pool.sort(key=len)
        chunks: list[list[list[int]]] = [[]]
        for tokens in pool:
            if sum(map(len, chunks[-1])) + len(tokens) > TOKENS_PER_STEP:
                chunks.append([])
            chunks[-1].append(tokens)
        rng.shuffle(chunks)
        yield from chunks


def taught(problem: Problem, rng: random.Random, ids: dict[str, int]) -> list[int]:
    """Return the tokens of a problem and of the teacher's answer."""
    return [ids[word] for word in f"{problem.prompt} {teacher_answer(problem, rng)}".split()]


def warm_up(model: Qwen3ForCausalLM, source: Iterator[list[list[int]]], pad_token_id: int, num_steps: int) -> None:
    """Train the model on the teacher's answers; the tokens of prompts have no loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.01)
    started = time.monotonic()
    for step in range(1, num_steps + 1):
        progress = max(0.0, (step - WARMUP_STEPS) / max(1, num_steps - WARMUP_STEPS))
        scale = min(1.0, step / WARMUP_STEPS) * (1 - (1 - FINAL_LR_RATIO) * progress)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * scale
        tokens = padded(next(source), pad_token_id)
        targets = tokens.clone()
        targets[:, :PROMPT_TOKENS] = -100
        targets[tokens == pad_token_id] = -100
        logits = model(input_ids=tokens).logits
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), targets[:, 1:].reshape(-1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == num_steps:
            elapsed = time.monotonic() - started
            print(f"  warm-up step {step}/{num_steps}  loss {loss.item():.3f}  {elapsed:.0f} s", flush=True)


def padded(rows: list[list[int]], pad_token_id: int) -> torch.Tensor:
    """Return the rows as int64 [rows, longest], padded on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, pad_token_id)


@torch.no_grad()
def share_of_right_verdicts(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """Return the share of verdicts on held-out problems in which the model prefers the teacher's verdict."""
    rng, ids = random.Random(0), tokenizer.get_vocab()
    problems = draw_problems(rng, 256, is_held_out=True)
    tokens = padded([taught(problem, rng, ids) for problem in problems], tokenizer.pad_token_id)
    ok, no = ids["ok"], ids["no"]
    logits, following = model(input_ids=tokens).logits[:, :-1], tokens[:, 1:]
    is_verdict = (following == ok) | (following == no)
    says_ok = logits[..., ok] > logits[..., no]
    return (says_ok == (following == ok))[is_verdict].double().mean().item()


def warm_up_until_it_can_tell(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, num_steps: int, enough: float
) -> None:
    """Train the model until the share ``enough`` of its verdicts is right.

    Raises:
        SystemExit: the verdicts are not right after the longest warm-up.
    """
    source = batches(random.Random(seed), tokenizer)
    for number, steps in enumerate((num_steps, *[MORE_STEPS] * MOST_ROUNDS)):
        if number:
            print(f"  it cannot tell right tries from wrong ones yet: {steps} steps more", flush=True)
        warm_up(model, source, tokenizer.pad_token_id, steps)
        share = share_of_right_verdicts(model, tokenizer)
        print(f"  {share:.1%} of its verdicts on tries are right", flush=True)
        if share >= enough:
            return
    raise SystemExit("error: the warm-up taught no verdicts; choose another --seed or more --steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=HERE, help="folder for data/ and model/ (default: beside this file)"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the model, its warm-up and the datasets")
    parser.add_argument("--steps", type=int, default=2300, help="optimiser steps of the warm-up")
    parser.add_argument(
        "--verdicts", type=float, default=0.95, help="share of right verdicts below which the warm-up is prolonged"
    )
    parser.add_argument("--prompts", type=int, default=2560, help="training prompts")
    parser.add_argument("--heldout", type=int, default=512, help="held-out prompts")
    parser.add_argument("--untied", action="store_true", help="give the output layer weights of its own")
    parser.add_argument("--force", action="store_true", help="build again what is there already")
    args = parser.parse_args()

    model_folder: Path = args.out / "model"
    if (model_folder / "config.json").exists() and not args.force:
        print(f"{model_folder} is there already (--force builds it again)")
        return
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    write_dataset(args.out / "data" / "train.jsonl", draw_problems(rng, args.prompts, is_held_out=False))
    write_dataset(args.out / "data" / "heldout.jsonl", draw_problems(rng, args.heldout, is_held_out=True))
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = PROMPT_TOKENS + MAX_ANSWER_TOKENS
    model = build_model(tokenizer, is_tied=not args.untied)
    print(f"Warming up a model of {model.num_parameters():,} parameters on a teacher that gives up too early:")
    warm_up_until_it_can_tell(model, tokenizer, args.seed, args.steps, args.verdicts)
    partial = model_folder.with_name("model.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(model_folder, ignore_errors=True)
    partial.rename(model_folder)
    print(f"wrote {args.out / 'data'} and {model_folder}")


if __name__ == "__main__":
    main()
