"""The child process that runs a user's reward function. Started as a script, never imported by the service.

::

    parent ──► {"queries", "prompts", "labels"} ──►  child: reward_func(queries, prompts, labels)
           ◄── {"rewards", "scores", "logs", "notes"} or {"failure", "key", "traceback"} ◄──

Parent and child exchange frames over one inherited socket. A frame is a 4-byte little-endian length and a msgpack map.
The child sends the first frame: ``{}`` when the function is loaded, or ``{"fault", "fix"}``. Labels travel as JSON text
(empty for no label), because JSON knows larger integers than msgpack. Standard output and standard error belong to the
user's code and go to the service's log.

This module imports only the standard library and msgpack, so that a function without further imports starts at once.
The module calls the function in the main thread, where code may set alarms.
"""

from __future__ import annotations

import faulthandler
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import io
import json
import math
import os
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Sequence
from decimal import Decimal
from numbers import Real
from types import ModuleType
from typing import Any

import msgpack

RewardFunction = Callable[[list[str], list[str], list[Any]], Any]

FLOAT32_MAX = 3.4028234663852886e38
MAX_TEXT = 400
MAX_KEY = 200
MAX_TRACEBACK = 8000
MAX_EXTRA_LOGS = 256
_LENGTH = struct.Struct("<I")
_FUNCTION = "reward_func"
_PATH_VARIABLE = "ROLLMESH_REWARD_FUNCTION"
"""The environment variable that tells processes of the user's code the path of the user's file."""
_FIX_SIGNATURE = f"define `def {_FUNCTION}(queries, prompts, labels)`"


class LoadError(Exception):
    """The file has no usable function. ``fix`` is an instruction for the user."""

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(problem)
        self.fix = fix


class ResultError(Exception):
    """The function returned a value that is no reward."""


def load_function(path: str) -> RewardFunction:
    """Import the file as module ``reward_func``, check the signature of its function, and return the function.

    Raises:
        LoadError: the file has no usable function; the message says why.
    """
    module = _import_file(path)
    function = getattr(module, _FUNCTION, None)
    if function is None:
        names = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == _FUNCTION]
        found = f"it defines {', '.join(names)}" if names else "it defines no functions"
        raise LoadError(f"has no {_FUNCTION} ({found})", _FIX_SIGNATURE)
    if not callable(function):
        raise LoadError(f"{_FUNCTION} is a {type(function).__name__}, not a function", _FIX_SIGNATURE)
    if inspect.iscoroutinefunction(function):
        raise LoadError(f"{_FUNCTION} is an `async def`", _FIX_SIGNATURE)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a built-in or extension function has no signature to read
        return function  # type: ignore[no-any-return]
    try:
        signature.bind([], [], [])
    except TypeError as error:
        problem = f"{_FUNCTION}{signature} does not take (queries, prompts, labels): {error}"
        raise LoadError(problem, _FIX_SIGNATURE) from error
    return function  # type: ignore[no-any-return]


class _FunctionFinder(importlib.abc.MetaPathFinder):
    """Finds the user's file under the module name ``reward_func``, whatever the name of the file.

    A process that `multiprocessing` starts by spawn or forkserver imports the modules of unpickled objects by name.
    Such a process runs this script as ``__mp_main__`` first, and so has this finder too.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _FUNCTION:
            return None
        return importlib.util.spec_from_file_location(_FUNCTION, self._path)


def _import_file(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(_FUNCTION, path)
    if spec is None or spec.loader is None:
        raise LoadError("is not a Python file", "name a file that ends in .py")
    os.environ[_PATH_VARIABLE] = path
    sys.meta_path.insert(0, _FunctionFinder(path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[_FUNCTION] = module
    sys.path.insert(0, os.path.dirname(path))
    try:
        spec.loader.exec_module(module)
    except BaseException as error:  # the user's code, which may also call sys.exit
        traceback.print_exc()
        line = error.lineno if isinstance(error, SyntaxError) and error.filename == path else _line_in(path, error)
        place = f" in line {line}" if line else ""
        raise LoadError(f"cannot be imported ({describe(error)}{place})", "correct the file") from error
    return module


def call_function(function: RewardFunction, path: str, request: dict[str, list[str]]) -> dict[str, Any]:
    """Call the function, and return a reply for its result or its failure."""
    queries, prompts = request["queries"], request["prompts"]
    labels = [json.loads(text) if text else "" for text in request["labels"]]
    try:
        return read_result(function(queries, prompts, labels), len(queries))
    except ResultError as error:
        return {"failure": str(error), "key": "result", "traceback": ""}
    except BaseException as error:  # noqa: BLE001 - the user's code, which may also call sys.exit
        line = _line_in(path, error)
        place = f"{os.path.basename(path)}:{line}" if line else ""
        reason = f"{_FUNCTION} raised {describe(error)}" + (f" ({place})" if place else "")
        key = f"{type(error).__name__} {place}"
        return {"failure": reason, "key": key, "traceback": clean(traceback.format_exc(), MAX_TRACEBACK)}


def read_result(result: Any, count: int) -> dict[str, Any]:
    """Return the reply for ``count`` samples out of the function's result.

    The result is OpenRLHF's dict (``rewards``, optional ``scores`` and ``extra_logs``) or the rewards alone. Values are
    numbers, lists, or objects with ``tolist`` or ``item``. The reply leaves out the entries of ``extra_logs`` that are
    no finite numbers, and notes them.

    Raises:
        ResultError: rewards or scores are missing, are not ``count`` finite numbers, or overflow float32.
    """
    try:
        if not isinstance(result, dict):
            rewards = scores = _column(result, count, "")
            return {"rewards": rewards, "scores": scores, "logs": [{}] * count, "notes": {}}
        if "rewards" not in result:
            raise ResultError('there is no "rewards" in it')
        rewards = _column(result["rewards"], count, "rewards: ")
        scores = rewards if result.get("scores") is None else _column(result["scores"], count, "scores: ")
    except ResultError as error:
        raise ResultError(f"{_FUNCTION} returned {short(result)}: {error}") from None
    logs, notes = _extra_logs(result.get("extra_logs"), count)
    return {"rewards": rewards, "scores": scores, "logs": logs, "notes": notes}


def _column(value: Any, count: int, name: str) -> list[float]:
    value = _plain(value)
    items = value if isinstance(value, list | tuple) else [value]
    if len(items) != count:
        raise ResultError(f"{name}{_many(len(items), 'value')} for {_many(count, 'sample')}")
    numbers = []
    for item in items:
        number = _number(item)
        if number is None:
            raise ResultError(f"{name}{short(item)} is not a number")
        if not math.isfinite(number) or abs(number) > FLOAT32_MAX:
            raise ResultError(f"{name}{number} is not a finite float32")
        numbers.append(number)
    return numbers


def _extra_logs(value: Any, count: int) -> tuple[list[dict[str, float]], dict[str, str]]:
    logs: list[dict[str, float]] = [{} for _ in range(count)]
    notes: dict[str, str] = {}
    if value is None:
        return logs, notes
    if not isinstance(value, dict):
        return logs, {"": f"extra_logs is {short(value)}, not a dict"}
    for key, entry in list(value.items())[:MAX_EXTRA_LOGS]:
        name, items = clean(str(key), MAX_KEY) or "?", _plain(entry)
        if not isinstance(items, list | tuple):
            items = [items] * count
        elif count == 1:
            items = items[:1]
        if len(items) != count:
            notes[name] = f"extra_logs[{name!r}] has {_many(len(items), 'value')} for {_many(count, 'sample')}"
            continue
        for log, item in zip(logs, items, strict=True):
            number = _number(item)
            if number is not None and math.isfinite(number):
                log[name] = number
            else:
                notes[name] = f"extra_logs[{name!r}] is {short(item)}, not a finite number"
    return logs, notes


def _plain(value: Any) -> Any:
    """Return an array or a tensor as a number or a list, by duck-typing: importing torch would cost seconds."""
    for method in ("tolist", "item"):
        convert = getattr(value, method, None)
        if callable(convert) and not isinstance(value, type):
            return convert()
    return value


def _number(value: Any) -> float | None:
    value = _plain(value)
    while isinstance(value, list | tuple) and len(value) == 1:
        value = _plain(value[0])
    if not isinstance(value, Real | Decimal):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer beyond float64
        return math.inf


def _many(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def short(value: Any) -> str:
    """Return ``repr(value)``, cut. Safe with objects whose ``repr`` raises."""
    try:
        text = repr(value)
    except Exception as error:  # noqa: BLE001 - the user's object
        text = f"<{type(value).__name__} whose repr raised {type(error).__name__}>"
    return clean(text)


def describe(error: BaseException) -> str:
    """Return an error on one line, e.g. ``ValueError: not a number``."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # noqa: BLE001 - the user's exception class
        text = "<no text>"
    return clean(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def clean(text: str, limit: int = MAX_TEXT) -> str:
    """Cut a text to ``limit`` characters, and replace characters that UTF-8 cannot carry."""
    text = text if len(text) <= limit else text[:limit] + "…"
    return text.encode("utf-8", "replace").decode("utf-8")


def _line_in(path: str, error: BaseException) -> int | None:
    """Return the innermost line of the user's file that the exception passed; None where it passed none."""
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == path]
    return lines[-1] if lines else None


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    body = msgpack.packb(message, unicode_errors="replace")
    connection.sendall(_LENGTH.pack(len(body)) + body)


def _receive(connection: socket.socket) -> dict[str, list[str]] | None:
    head = _receive_exactly(connection, _LENGTH.size)
    body = head and _receive_exactly(connection, _LENGTH.unpack(head)[0])
    return msgpack.unpackb(body) if body else None


def _receive_exactly(connection: socket.socket, length: int) -> bytes | None:
    """Read ``length`` bytes. Return None where the parent closed its end."""
    data = connection.recv(length, socket.MSG_WAITALL)
    while len(data) < length:  # a signal came between
        more = connection.recv(length - len(data), socket.MSG_WAITALL)
        if not more:
            return None
        data += more
    return data


def main(arguments: Sequence[str]) -> int:
    """Run the child. The arguments are the socket's file descriptor and the absolute path of the user's file."""
    descriptor, path = int(arguments[0]), arguments[1]
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)
    # A process that the user's code forks must not keep the socket open: the closing tells the parent that the child
    # ended.
    os.register_at_fork(after_in_child=connection.close)
    faulthandler.enable()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        function = load_function(path)
    except LoadError as error:
        _send(connection, {"fault": str(error), "fix": error.fix})
        return 1
    _send(connection, {})
    while (request := _receive(connection)) is not None:
        _send(connection, call_function(function, path, request))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
elif __name__ == "__mp_main__" and _PATH_VARIABLE in os.environ:  # started by the user's code
    sys.meta_path.insert(0, _FunctionFinder(os.environ[_PATH_VARIABLE]))
