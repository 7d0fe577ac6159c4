"""The user's file is refused at the start, within a second or so, with a sentence that says what to do."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from rollmesh.errors import ConfigError
from services.reward import preflight
from services.reward.config import RewardSection
from services.reward.preflight import TrialCall, check_function
from tests.unit.reward.conftest import WriteFunction, running_pool

TRIAL = TrialCall("train.jsonl, row 1", "<user> 1 + 2", "[3]")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def score(q, p, l): return 0\ndef other(): pass", ["has no reward_func", "score, other", "define `def"]),
        ("from os.path import join\n", ["has no reward_func", "no functions"]),
        ("reward_func = 3", ["reward_func is a int, not a function"]),
        ("def reward_func(queries, prompts): return 0", ["reward_func(queries, prompts) does not take"]),
        ("def reward_func(queries, prompts, labels, *, extra): return 0", ["does not take", "extra"]),
        ("async def reward_func(queries, prompts, labels): return 0", ["async def"]),
        ("x = 1\nimport surely_not_installed", ["ModuleNotFoundError", "surely_not_installed", "in line 2"]),
        ("x = 1\n\ndef reward_func(:", ["SyntaxError", "in line 3"]),
        ("import sys\nsys.exit(3)", ["SystemExit: 3", "in line 2"]),
        ("import os\nos._exit(3)", ["cannot be imported", "exit code 3"]),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", ["was killed by SIGKILL"]),
        ("\0", ["cannot be imported"]),
    ],
)
def test_a_file_without_a_usable_function_is_refused(
    write_function: WriteFunction, source: str, words: list[str]
) -> None:
    path = write_function(source)
    with pytest.raises(ConfigError) as caught:
        check_function(path, RewardSection(), None)
    assert str(caught.value).startswith(f"reward.function: {path} ")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "def reward_func(queries, prompts, labels): 1 / 0",
        "def reward_func(queries, prompts, labels, weight=1.0, **kwargs): return 0",
        "def reward_func(*args): return 0",
        "from functools import partial\ndef f(k, q, p, l): return 0\nreward_func = partial(f, 1)",
        "class Grader:\n    def __call__(self, q, p, l): return 0\nreward_func = Grader()",
        "print('x' * 1_000_000)\ndef reward_func(q, p, l): return 0",
    ],
)
def test_a_usable_function_is_accepted_and_not_called_if_that_is_unwanted(
    write_function: WriteFunction, source: str
) -> None:
    check_function(write_function(source), RewardSection(should_probe=False), TRIAL)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise KeyError('lost')", "reward_func raised KeyError: 'lost' (graders.py:2)"),
        (
            "return {'rewards': [1.0, 2.0]}",
            "reward_func returned {'rewards': [1.0, 2.0]}: rewards: 2 values for 1 sample",
        ),
        ("return {'rewards': [float('nan')]}", "rewards: nan is not a finite float32"),
        ("return {'scores': [1.0]}", 'there is no "rewards" in it'),
        ("return None", "reward_func returned None: None is not a number"),
        ("return 'a\\nb'", "reward_func returned 'a\\nb': 'a\\nb' is not a number"),
        ("import os; os._exit(3)", "the reward process ended with exit code 3 during the call"),
        ("import sys; sys.exit(3)", "reward_func raised SystemExit: 3 (graders.py:2)"),
    ],
)
def test_a_function_that_gives_no_reward_is_refused_with_the_row_it_was_given(
    write_function: WriteFunction, body: str, reason: str
) -> None:
    path = write_function(f"def reward_func(queries, prompts, labels):\n    {body}\n")
    with pytest.raises(ConfigError) as caught:
        check_function(path, RewardSection(), TRIAL)
    message = str(caught.value)
    assert message.startswith(f"reward.function: {path} gives no reward for train.jsonl, row 1 with an empty answer: ")
    assert message.endswith(f"{reason}; correct it, or set reward.should_probe to false")
    assert "\n" not in message


@pytest.mark.parametrize(
    "answer",
    [
        "{'rewards': [1], 'scores': [0.5], 'extra_logs': {'length': [2]}}",
        "{'rewards': 1.0}",
        "[1.0]",
        "(1,)",
        "2",
        "numpy.array([1.0])",
        "numpy.float32(1.0)",
        "{'rewards': numpy.array([[1]])}",
    ],
)
def test_whatever_the_service_takes_for_a_reward_passes(write_function: WriteFunction, answer: str) -> None:
    path = write_function(f"import numpy\ndef reward_func(queries, prompts, labels):\n    return {answer}\n")
    assert check_function(path, RewardSection(), TRIAL) == "reward_func found, and answers"


def test_the_function_is_called_once_with_the_prompt_its_label_and_an_empty_answer(
    write_function: WriteFunction, tmp_path: Path
) -> None:
    path = write_function(
        """
        from pathlib import Path
        def reward_func(*arguments):
            with Path(__file__).with_name("calls").open("a") as calls:
                print(arguments, file=calls)
            return [0.0]
        """
    )
    check_function(path, RewardSection(), TRIAL)
    prompt = TRIAL.prompt
    assert (tmp_path / "calls").read_text() == f"{([prompt], [prompt], [[3]])}\n"


def test_a_function_that_does_not_return_in_its_time_is_refused(write_function: WriteFunction) -> None:
    path = write_function("import time\ndef reward_func(q, p, l): time.sleep(600)")
    with pytest.raises(ConfigError) as caught:
        check_function(path, RewardSection(timeout_s=0.5), TRIAL)
    assert "reward_func took longer than the 0.5 s of reward.timeout_s; make it faster or raise" in str(caught.value)


def test_a_function_that_may_take_long_is_not_waited_for(
    write_function: WriteFunction, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "TRIAL_LIMIT_S", 0.5)
    path = write_function("import time\ndef reward_func(q, p, l): time.sleep(600)")
    result = check_function(path, RewardSection(timeout_s=900.0), TRIAL)
    assert result == "warning: no reward after 0.5 s; reward.timeout_s lets a call take 900 s"


def test_a_function_that_prints_much_says_nothing_at_the_command_line(
    write_function: WriteFunction, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_function("def reward_func(q, p, l):\n    print('x\\n' * 10_000)\n    return 0")
    check_function(path, RewardSection(), TRIAL)
    assert capfd.readouterr() == ("", "")


def test_an_import_that_takes_for_ever_is_given_up(write_function: WriteFunction) -> None:
    path = write_function("import time\ntime.sleep(600)")
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"took longer than 0\.7 s; .*reward\.start_timeout_s"):
        check_function(path, RewardSection(start_timeout_s=0.7), None)
    assert time.monotonic() - start < 15


@pytest.mark.parametrize(
    ("name", "problem"), [("absent.py", "does not exist"), (".", "is a folder"), ("f.txt", "not a Python file")]
)
def test_what_is_no_python_file_is_refused(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "f.txt").write_text("def reward_func(q, p, l): return 0")
    with pytest.raises(ConfigError, match=problem):
        check_function(tmp_path / name, RewardSection(), None)


def test_a_file_finds_its_neighbours_and_not_the_files_of_the_service(write_function: WriteFunction) -> None:
    path = write_function(
        """
        import config
        assert config.ANSWER == 42
        def reward_func(queries, prompts, labels): return config.ANSWER
        """
    )
    path.with_name("config.py").write_text("ANSWER = 42")
    check_function(path, RewardSection(), None)


def test_the_pool_refuses_the_same_files_and_leaves_no_child(write_function: WriteFunction) -> None:
    async def start() -> None:
        async with running_pool(write_function("x = 1\nimport surely_not_installed"), num_processes=2):
            pass

    with pytest.raises(ConfigError, match="surely_not_installed"):
        asyncio.run(start())
