"""The user's file is refused at the start, within a second or so, with a sentence that says what to do."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from rollmesh.errors import ConfigError
from services.reward.preflight import check_function
from tests.unit.reward.conftest import WriteFunction, running_pool


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
        check_function(path, timeout_s=20.0)
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
def test_a_usable_function_is_accepted_without_being_called(write_function: WriteFunction, source: str) -> None:
    check_function(write_function(source), timeout_s=20.0)


def test_an_import_that_takes_for_ever_is_given_up(write_function: WriteFunction) -> None:
    path = write_function("import time\ntime.sleep(600)")
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"took longer than 0\.7 s; .*reward\.start_timeout_s"):
        check_function(path, timeout_s=0.7)
    assert time.monotonic() - start < 15


@pytest.mark.parametrize(
    ("name", "problem"), [("absent.py", "does not exist"), (".", "is a folder"), ("f.txt", "not a Python file")]
)
def test_what_is_no_python_file_is_refused(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "f.txt").write_text("def reward_func(q, p, l): return 0")
    with pytest.raises(ConfigError, match=problem):
        check_function(tmp_path / name, timeout_s=20.0)


def test_a_file_finds_its_neighbours_and_not_the_files_of_the_service(write_function: WriteFunction) -> None:
    path = write_function(
        """
        import config
        assert config.ANSWER == 42
        def reward_func(queries, prompts, labels): return config.ANSWER
        """
    )
    path.with_name("config.py").write_text("ANSWER = 42")
    check_function(path, timeout_s=20.0)


def test_the_pool_refuses_the_same_files_and_leaves_no_child(write_function: WriteFunction) -> None:
    async def start() -> None:
        async with running_pool(write_function("x = 1\nimport surely_not_installed"), num_processes=2):
            pass

    with pytest.raises(ConfigError, match="surely_not_installed"):
        asyncio.run(start())
