"""Every line on stderr is one JSON object, or readable where a person looks."""

from __future__ import annotations

import io
import json
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest

from rollmesh.telemetry.logs import configure


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    hooks = sys.excepthook, threading.excepthook
    yield
    root.handlers, root.level = handlers, level
    sys.excepthook, threading.excepthook = hooks
    logging.captureWarnings(False)


@pytest.fixture
def stream() -> io.StringIO:
    stream = io.StringIO()
    configure("run-7", "rollout-0", stream=stream)
    return stream


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in stream.getvalue().splitlines()]


def test_a_line_says_when_who_and_what(stream: io.StringIO) -> None:
    logging.getLogger("rollmesh.replay").info("committed %s", "a group")
    (line,) = lines(stream)
    assert datetime.fromisoformat(line.pop("time")).tzinfo is not None
    assert line == {
        "level": "info",
        "run": "run-7",
        "service": "rollout-0",
        "logger": "rollmesh.replay",
        "message": "committed a group",
    }


def test_fields_of_extra_are_fields_of_the_line(stream: io.StringIO) -> None:
    extra = {"group": "train:0:17", "tokens": 12, "nested": {"a": [1, 2.5, None, True]}}
    logging.getLogger("rollmesh").warning("slow", extra=extra)
    (line,) = lines(stream)
    assert {key: line[key] for key in extra} == extra


def test_values_that_json_does_not_know_become_text(stream: io.StringIO) -> None:
    extra = {"rate": float("nan"), "limits": (float("inf"), 1), "error": ValueError("odd")}
    logging.getLogger("rollmesh").info("x", extra=extra)
    (line,) = lines(stream)
    assert (line["rate"], line["limits"], line["error"]) == ("nan", ["inf", 1], "odd")


def test_a_field_cannot_take_the_place_of_a_standard_one(stream: io.StringIO) -> None:
    logging.getLogger("rollmesh").info("x", extra={"run": "other", "level": "loud"})
    (line,) = lines(stream)
    assert (line["run"], line["level"]) == ("run-7", "info")
    assert (line["extra_run"], line["extra_level"]) == ("other", "loud")


def test_a_traceback_and_a_text_of_many_lines_stay_one_line(stream: io.StringIO) -> None:
    try:
        raise KeyError("odd")
    except KeyError:
        logging.getLogger("rollmesh").exception("failed\nwith €")
    (line,) = lines(stream)
    assert line["message"] == "failed\nwith €"
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("KeyError: 'odd'")


def test_configuring_again_replaces_and_does_not_double(stream: io.StringIO) -> None:
    second = io.StringIO()
    configure("run-8", "reward", stream=second)
    logging.getLogger("rollmesh").info("once")
    assert stream.getvalue() == ""
    assert [line["run"] for line in lines(second)] == ["run-8"]


def test_handlers_of_others_stay() -> None:
    other = logging.NullHandler()
    logging.getLogger().addHandler(other)
    configure("run-7", "reward", stream=io.StringIO())
    assert other in logging.getLogger().handlers


def test_a_person_gets_readable_lines() -> None:
    terminal = Terminal()
    configure("run-7", "reward", stream=terminal)
    logging.getLogger("rollmesh").warning("slow", extra={"group": "train:0:17"})
    assert terminal.getvalue().endswith(" W reward: slow group=train:0:17\n")


@pytest.mark.parametrize("library", ["httpx", "grpc", "transformers", "vllm.engine"])
def test_libraries_are_heard_from_warnings_on(stream: io.StringIO, library: str) -> None:
    logging.getLogger(library).info("everyday")
    logging.getLogger(library).warning("serious")
    assert [line["message"] for line in lines(stream)] == ["serious"]


def test_the_level_is_for_the_mesh_s_own_messages() -> None:
    stream = io.StringIO()
    configure("run-7", "reward", stream=stream, level=logging.DEBUG)
    logging.getLogger("rollmesh").debug("detail")
    logging.getLogger("asyncio").debug("noise")
    assert [line["message"] for line in lines(stream)] == ["detail"]


def test_warnings_become_lines(stream: io.StringIO) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.warn("old interface", stacklevel=1)
    (line,) = lines(stream)
    assert "old interface" in line["message"]
    assert line["level"] == "warning"


def test_an_exception_that_nobody_caught_becomes_a_line(stream: io.StringIO) -> None:
    error = ValueError("odd")
    sys.excepthook(ValueError, error, None)
    (line,) = lines(stream)
    assert (line["level"], line["message"]) == ("critical", "uncaught exception")
    assert line["exception"].endswith("ValueError: odd")


def test_a_thread_that_dies_becomes_a_line(stream: io.StringIO) -> None:
    def die() -> None:
        raise ValueError("odd")

    thread = threading.Thread(target=die, name="intake")
    thread.start()
    thread.join(10)
    (line,) = lines(stream)
    assert line["message"] == "thread 'intake' died"
    assert line["exception"].endswith("ValueError: odd")
