"""The output of vLLM tells why an engine ended."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from services.rollout.engine_log import EngineLog, hint, root_cause

CORE = """\
(EngineCore pid=812) ERROR 11-26 13:36:45 [core.py:1234] EngineCore failed to start.
(EngineCore pid=812) ERROR 11-26 13:36:45 [core.py:1234] Traceback (most recent call last):
(EngineCore pid=812) ERROR 11-26 13:36:45 [core.py:1234]   File "core.py", line 1, in run
(EngineCore pid=812) ERROR 11-26 13:36:45 [core.py:1234]     raise ValueError("head")
(EngineCore pid=812) ERROR 11-26 13:36:45 [core.py:1234] ValueError: head_size 16 is not supported.
(EngineCore pid=812) Process EngineCore:
(EngineCore pid=812) Traceback (most recent call last):
(EngineCore pid=812) ValueError: head_size 16 is not supported.
Traceback (most recent call last):
  File "utils.py", line 1, in wait
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore_DP0': 1}
"""


def test_the_first_exception_is_the_cause_and_not_those_that_point_to_it() -> None:
    assert root_cause(CORE) == "ValueError: head_size 16 is not supported"


def test_the_root_of_a_chain_comes_first() -> None:
    text = "Traceback (most recent call last):\nOSError: [Errno 24] Too many open files\n\nThe above exception was the "
    text += "direct cause of the following exception:\n\nTraceback (most recent call last):\nRuntimeError: no socket\n"
    assert root_cause(text) == "OSError: [Errno 24] Too many open files"


def test_what_was_raised_in_place_of_a_handled_exception_counts() -> None:
    text = "Traceback (most recent call last):\nKeyError: 'qwen99'\n\nDuring handling of the above exception, another "
    text += "exception occurred:\n\nTraceback (most recent call last):\nvllm.ConfigError: Qwen99 is not known\n"
    assert root_cause(text) == "vllm.ConfigError: Qwen99 is not known"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "WARNING: slow\nValueError: is no traceback\n",
        CORE[CORE.index('Traceback (most recent call last):\n  File "utils') :],
    ],
)
def test_a_log_without_a_cause_gives_none(text: str) -> None:
    assert root_cause(text) == ""


@pytest.mark.parametrize(
    ("cause", "advice"),
    [
        ("ValueError: head_size 16 is not supported", "head size"),
        ("zmq.error.ZMQError: Too many open files", "ulimit -n"),
        ("ValueError: Available memory on node 0 is less than requested memory for kv", "more memory"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", "more memory"),
        ("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory", "more memory"),
        ("ValueError: Model architectures ['Qwen99ForCausalLM'] are not supported for now.", "architecture"),
        (
            "ValueError: To serve at least one request with the model's max seq len (9), KV cache is needed",
            "max_length",
        ),
        ("OSError: [Errno 98] Address already in use", "port"),
        ("ValueError: something else", ""),
    ],
)
def test_known_causes_come_with_what_to_do(cause: str, advice: str) -> None:
    assert advice in hint(cause)
    assert bool(hint(cause)) == bool(advice)


def test_only_what_was_printed_since_the_start_counts(tmp_path: Path) -> None:
    path = tmp_path / "rollout-0.log"
    path.write_text("Traceback (most recent call last):\nValueError: of an earlier start\n")
    log = EngineLog(path, path.stat().st_size)
    failed = RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
    assert log.explain("vLLM did not start", failed) == f"vLLM did not start; see {path}"
    with path.open("a") as file:
        file.write(CORE)
    assert log.explain("vLLM did not start", failed) == (
        "vLLM did not start: ValueError: head_size 16 is not supported; the attention kernels lack this head size; "
        f"use another model, or a GPU; see {path}"
    )


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            RuntimeError("Engine core initialization failed. Failed core proc(s): {'E': 1}"),
            "vLLM did not start; the",
        ),
        (
            RuntimeError("Engine core initialization failed. Failed core proc(s): {'E': -9}"),
            "vLLM did not start: a process of vLLM was ended by SIGKILL; the kernel does that when memory runs out;",
        ),
        (OSError(24, "Too many open files"), "OSError: [Errno 24] Too many open files; raise the limit of open files"),
    ],
)
def test_without_a_log_file_the_error_itself_is_the_cause(error: Exception, sentence: str) -> None:
    assert sentence in EngineLog(None).explain("vLLM did not start", error)


def test_standard_error_is_found_where_it_is_a_file(capfd: pytest.CaptureFixture[str]) -> None:
    sys.stderr.flush()
    log = EngineLog.begin()  # pytest's capture is an unlinked file or a pipe: either way there is nothing to name
    assert log.path is None or log.path.exists()
