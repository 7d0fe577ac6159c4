"""The arithmetic example's tasks and reward. What reasoning-gym judges is judged by reasoning-gym."""

from __future__ import annotations

import importlib.util
import json
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("reasoning_gym", reason="pip install -e '.[arithmetic]'")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"arithmetic_{name}", f"examples/arithmetic/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build, reward = load("build"), load("reward_func")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The answer is 1,024.", 1.0),
        ("1024", 1.0),
        ("1000 + 24 = 1024", 1.0),
        ("1024 - 1", 0.0),
        ("-1024", 0.0),
        ("11024", 0.0),
        ("no idea", 0.0),
        ("", 0.0),
    ],
)
def test_the_last_number_of_an_answer_counts(answer: str, expected: float) -> None:
    label = json.dumps({"answer": "1024", "metadata": {"source_dataset": "chain_sum"}})
    result = reward.reward_func([f"1000 + 24 ={answer}"], ["1000 + 24 ="], [label])
    assert result["rewards"] == result["scores"] == [expected]


def test_right_answers_of_the_tasks_are_rewarded_and_others_are_not() -> None:
    for row in islice(build.problems(1, is_held_out=False), 50):
        answer = json.loads(row["label"])["answer"]
        queries = [f"{row['input']} It is {answer}.", f"{row['input']} It is {int(answer) + 1}."]
        assert reward.reward_func(queries, [row["input"]] * 2, [row["label"]] * 2)["rewards"] == [1.0, 0.0]


def test_no_question_is_trained_on_that_any_seed_judges_by(tmp_path: Path) -> None:
    questions: dict[str, list[str]] = {"train": [], "heldout": []}
    for seed in (1, 2):
        build.write_datasets(tmp_path, seed, num_prompts=1500, num_heldout=100)
        for name, seen in questions.items():
            rows = (tmp_path / f"{name}.jsonl").read_text().splitlines()
            seen += [json.loads(row)["input"] for row in rows]
    assert [len(questions["train"]), len(questions["heldout"])] == [2 * 1500, 2 * 100]
    assert len(set(questions["heldout"][:100])) == 100
    assert not set(questions["train"]) & set(questions["heldout"])
