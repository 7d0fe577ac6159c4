"""A mesh with Gemma 2, which caps its attention scores and so needs another attention implementation than usual."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.integration.mesh_runs import run_mesh
from tests.unit.models.architectures import make_model

pytestmark = [pytest.mark.mesh, pytest.mark.timeout(400)]


def test_learner_reference_and_engine_compute_the_same_probabilities(demo: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    changes = {
        "tie_word_embeddings": True,
        "head_dim": 32,
        "query_pre_attn_scalar": 1,
        "attn_logit_softcapping": 5.0,
        "sliding_window": 16,
    }
    make_model("gemma2", vocab_size=len(tokenizer), **changes, **special).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "reward.py").write_text(
        "def reward_func(queries, prompts, labels):\n    return [float(len(query) % 2) for query in queries]\n"
    )
    overrides = [
        f"model.path={tmp_path / 'model'}",
        f"reward.function={tmp_path / 'reward.py'}",
        "training.prompts_per_step=8",
        "training.samples_per_prompt=4",
        "training.steps=3",
        "training.max_staleness=0",
        "learner.optimizer.lr=1e-3",
        "learner.optimizer.warmup_steps=0",
        "evaluation=null",
    ]
    lines = run_mesh(demo, tmp_path, "gemma2", overrides, timeout_s=380).lines("metrics.jsonl")
    # The share is (mean w)² / mean w² of the ratios w. With w of 1 - 1e-5 and 1 + 1e-5, the share is 1e-10 below 1.
    assert [line["importance/effective_share"] for line in lines] == pytest.approx([1.0] * 3, abs=1e-10)
    assert [line["policy/kl_behaviour"] for line in lines] == pytest.approx([0.0] * 3, abs=1e-6)
    assert lines[0]["kl/reference"] == pytest.approx(0.0, abs=1e-9)
    assert lines[2]["kl/reference"] > 1e-6, "the weights have to move, or later steps show nothing"
