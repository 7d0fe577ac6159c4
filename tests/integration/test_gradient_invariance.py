"""The gradient of a batch does not depend on packing, micro-batches, ranks or the ZeRO stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rollmesh.config import dump_yaml
from rollmesh.replay.recording import RecordedStep, record_batch
from tests.unit.learner.samples import mesh_config, random_groups, write_tiny_model

pytestmark = [pytest.mark.engine, pytest.mark.timeout(280)]

REPOSITORY = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-5
OBJECTIVES = {
    "grpo": ["algorithm.kl.coef=0.05", "algorithm.entropy_coef=0.01"],
    "gspo": ["algorithm.type=gspo", "algorithm.loss.clip_low=0.2", "algorithm.loss.clip_high=0.3"],
    "dr_grpo": [
        "algorithm.type=dr_grpo",
        "algorithm.correction.type=seq_mask_tis",
        "algorithm.loss.constant_tokens=60",
    ],
    "prompts": ["algorithm.loss.aggregation=prompt_mean", "algorithm.correction.type=m2po"],
    "cispo": ["algorithm.type=cispo", "algorithm.correction.type=tis", "algorithm.advantage.mixed_version=weight"],
    "ppo": ["algorithm.type=ppo", "algorithm.kl.coef=0.05"],
}
MANY = ["learner.tokens_per_micro_batch=70", "model.max_length=70", "sampling.max_new_tokens=60"]
ALONE = {
    "packed": [],
    "padded": ["learner.packing=false"],
    "many": MANY,
    "many-padded": [*MANY, "learner.packing=false"],
}
SHARDED = {f"zero-{stage}": [f"learner.zero_stage={stage}"] for stage in (0, 2, 3)}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a mesh file and a recorded batch: unequal groups of three versions."""
    folder = tmp_path_factory.mktemp("run")
    config = mesh_config(write_tiny_model(folder / "model"), folder, reference={}, learner={"zero_stage": 0})
    tree = config.model_dump(mode="json", exclude={"algorithm"})  # every variant sets the algorithm
    (folder / "mesh.yaml").write_text(dump_yaml(tree), encoding="utf-8")
    groups = [
        group
        for version in (1, 2, 3)
        for group in random_groups(2, 4, seed=version, first_prompt=10 * version, version=version, has_reference=True)
    ]
    record_batch(folder, RecordedStep(1, "0.3", 1, 1, ""), groups)
    return folder


def _gradients(folder: Path, variants: dict[str, list[str]], num_ranks: int) -> dict[str, np.ndarray]:
    every = {f"{o}:{v}": [*overrides, *more] for o, overrides in OBJECTIVES.items() for v, more in variants.items()}
    every |= {"grpo:half": OBJECTIVES["grpo"], "grpo:parts": [*OBJECTIVES["grpo"], "learner.steps_per_batch=2"]}
    if num_ranks > 1:
        every = {name: [*overrides, f"learner.num_ranks={num_ranks}"] for name, overrides in every.items()}
    output = folder / f"gradients-{num_ranks}.npz"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    command = [sys.executable, *(launcher if num_ranks > 1 else []), "-m", "tests.integration.gradients"]
    command += [str(folder / "mesh.yaml"), str(folder / "step-000001.msgpack"), json.dumps(every), str(output)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    subprocess.run(command, check=True, timeout=240, cwd=REPOSITORY, env=environment)
    with np.load(output) as found:
        return dict(found)


@pytest.fixture(scope="module")
def alone(run_folder: Path) -> dict[str, np.ndarray]:
    return _gradients(run_folder, ALONE, num_ranks=1)


@pytest.fixture(scope="module")
def sharded(run_folder: Path) -> dict[str, np.ndarray]:
    return _gradients(run_folder, SHARDED, num_ranks=2)


def _of(found: dict[str, np.ndarray], variant: str) -> dict[str, np.ndarray]:
    prefixes = (f"{variant}/policy/", f"{variant}/critic/")
    return {key.removeprefix(f"{variant}/"): g for key, g in found.items() if key.startswith(prefixes)}


def _assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    largest = max(np.abs(gradient).max() for gradient in expected.values())
    assert largest > 1e-3, "the gradient vanishes, and the comparison says nothing"
    for name, gradient in expected.items():
        difference = np.abs(found[name] - gradient).max()
        assert difference < TOLERANCE * largest, f"{name} differs by {difference:g}, the largest is {largest:g}"


def test_the_batches_are_cut_as_differently_as_the_names_say(alone: dict[str, np.ndarray]) -> None:
    assert alone["grpo:packed/num_passes"] == 1
    assert alone["grpo:padded/num_passes"] == 1
    assert alone["grpo:many/num_passes"] >= 7
    assert alone["grpo:many-padded/num_passes"] >= 7


@pytest.mark.parametrize("variant", [name for name in ALONE if name != "packed"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_packing_and_micro_batches_do_not_change_the_gradient(
    alone: dict[str, np.ndarray], objective: str, variant: str
) -> None:
    _assert_equal(_of(alone, f"{objective}:{variant}"), _of(alone, f"{objective}:packed"))


@pytest.mark.parametrize("variant", SHARDED)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ranks_and_zero_stages_do_not_change_the_gradient(
    alone: dict[str, np.ndarray], sharded: dict[str, np.ndarray], objective: str, variant: str
) -> None:
    _assert_equal(_of(sharded, f"{objective}:{variant}"), _of(alone, f"{objective}:packed"))


def test_the_first_of_several_steps_on_a_batch_is_that_of_its_part_alone(
    alone: dict[str, np.ndarray], sharded: dict[str, np.ndarray]
) -> None:
    expected = _of(alone, "grpo:half")
    _assert_equal(_of(alone, "grpo:parts"), expected)
    _assert_equal(_of(sharded, "grpo:parts"), expected)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_differ(alone: dict[str, np.ndarray], objective: str) -> None:
    """If overrides had no effect, the tests above would pass and this test would fail."""
    mine = _of(alone, f"{objective}:packed")["policy/causal_lm.model.embed_tokens.weight"]
    for other in OBJECTIVES:
        if other != objective:
            theirs = _of(alone, f"{other}:packed")["policy/causal_lm.model.embed_tokens.weight"]
            assert np.abs(mine - theirs).max() > 10 * TOLERANCE
