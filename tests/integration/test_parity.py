"""A learner that computes another model than the engine is stopped at the first batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.mesh_runs import finish_mesh, start_mesh

pytestmark = [pytest.mark.mesh, pytest.mark.timeout(400)]


def test_a_model_that_the_engine_computes_otherwise_ends_the_run_before_its_first_step(
    demo: Path, tmp_path: Path
) -> None:
    overrides = [
        "run.name=other",
        "training.prompts_per_step=8",
        "training.samples_per_prompt=4",
        "training.steps=4",
        "evaluation=null",
        "algorithm.kl.coef=0",
        'rollout.engine.extra={"hf_overrides": {"rms_norm_eps": 0.1}}',  # the model has another epsilon
    ]
    run = finish_mesh(start_mesh(demo, tmp_path, overrides), tmp_path / "other", timeout_s=280)
    assert run.exit_code == 1, run.output
    (error,) = (line for line in run.output.splitlines() if line.startswith("error: "))
    assert (
        "learner.parity: learner and engine disagree about the same weights (learner float32, engine float32)" in error
    )
    assert "set learner.parity to warn" in error
    assert not (run.folder / "metrics.jsonl").exists() or not run.lines("metrics.jsonl")
