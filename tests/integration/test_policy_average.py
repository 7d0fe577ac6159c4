"""The average of the policy, in an export and after a resume, under several ZeRO stages and numbers of ranks.

The same runs show that policy and critic train alike on one rank and on two ranks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.learner.ranks import Ranks
from tests.integration.learnables_run import NUM_STEPS, SAVED_STEP, ppo_config, run
from tests.unit.learner.samples import write_tiny_model

pytestmark = pytest.mark.engine

STAGES = (0, 2, 3)
REPOSITORY = Path(__file__).resolve().parents[2]
Outcome = tuple[Path, dict[str, list[list[float]]]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(model: Path, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Outcome]:
    """Return the outcomes of the runs on one rank, by ZeRO stage."""
    folder = tmp_path_factory.mktemp("alone")
    outcomes = {}
    for stage in STAGES:
        config = ppo_config(model, folder / str(stage), stage)
        outcomes[stage] = config.run.folder, run(config, ranks)
    return outcomes


@pytest.fixture(scope="module")
def together(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Outcome]:
    """Return the outcomes of the runs on two ranks, by ZeRO stage."""
    folder = tmp_path_factory.mktemp("together")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.integration.learnables_run", "--model", str(model), "--folder", str(folder), "--stages"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    subprocess.run([*command, *map(str, STAGES)], check=True, timeout=280, cwd=REPOSITORY, env=environment)
    outcomes = {}
    for stage in STAGES:
        outcome = json.loads((folder / str(stage) / "outcome.json").read_text(encoding="utf-8"))
        outcomes[stage] = ppo_config(model, folder / str(stage), stage).run.folder, outcome
    return outcomes


@pytest.fixture(params=["alone", "together"])
def outcomes(request: pytest.FixtureRequest) -> dict[int, Outcome]:
    found: dict[int, Outcome] = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_the_average_is_that_of_the_formula_after_some_steps_and_after_a_resume(
    outcomes: dict[int, Outcome], stage: int
) -> None:
    folder, _ = outcomes[stage]
    expected = load_file(folder / "average.safetensors")
    for export in (f"export-step-{NUM_STEPS:06d}", "export"):
        averaged = AutoModelForCausalLM.from_pretrained(folder / export / "average", dtype="auto")
        policy = dict(AutoModelForCausalLM.from_pretrained(folder / export, dtype="auto").named_parameters())
        for name, tensor in averaged.named_parameters():
            torch.testing.assert_close(tensor.data, expected[name], atol=1e-6, rtol=1e-6)
        assert max((expected[name] - policy[name].data).abs().max().item() for name in policy) > 1e-4
        assert AutoTokenizer.from_pretrained(folder / export / "average").encode("5 6") == [5, 6]


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_goes_on_with_the_same_numbers(outcomes: dict[int, Outcome], stage: int) -> None:
    _, outcome = outcomes[stage]
    for resumed, through in zip(outcome["resumed"], outcome["through"][SAVED_STEP:], strict=True):
        assert resumed == pytest.approx(through, rel=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_policy_and_critic_train_alike_under_every_stage_and_on_two_ranks(
    outcomes: dict[int, Outcome], alone: dict[int, Outcome], stage: int
) -> None:
    for found, expected in zip(outcomes[stage][1]["through"], alone[0][1]["through"], strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
