"""Logs on stderr: one JSON object a line, or lines for a person where stderr is a terminal.

Modules log with the standard library: ``logging.getLogger(__name__)``, with fields in ``extra``::

    _logger.info("group committed", extra={"group": group_id, "version": str(version)})
"""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TextIO

# vLLM's record factory adds the last of these names to every record of the process, our own records included.
_STANDARD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "vllm_process_name"}

_NOISY = (
    "DeepSpeed",
    "asyncio",
    "datasets",
    "filelock",
    "fsspec",
    "grpc",
    "httpcore",
    "httpx",
    "huggingface_hub",
    "matplotlib",
    "numba",
    "torch",
    "transformers",
    "urllib3",
    "vllm",
)
"""Libraries of which only warnings and errors are logged."""


class JsonFormatter(logging.Formatter):
    """Log records as JSON objects, one a line.

    An object holds ``time``, ``level``, ``run``, ``service``, ``logger`` and ``message``, then the fields of ``extra``,
    then the traceback under ``exception``. A field of ``extra`` with one of these names gets the prefix ``extra_``.
    """

    def __init__(self, run: str, service: str) -> None:
        super().__init__()
        self._run = run
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _timestamp(record),
            "level": record.levelname.lower(),
            "run": self._run,
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for key, value in _extra(record).items():
            line[f"extra_{key}" if key in line or key == "exception" else key] = _plain(value)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class TerminalFormatter(logging.Formatter):
    """Log records as lines for a person: time of day, level, service, message, fields; then the traceback."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        fields = "".join(f" {key}={value}" for key, value in _extra(record).items())
        line = f"{time} {record.levelname[0]} {self._service}: {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _MeshHandler(logging.StreamHandler[TextIO]):
    """The handler of `configure`. A second call finds the handler by this class, and replaces it."""


def configure(run: str, service: str, *, level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Send the logs of this process to stderr. A second call replaces the handler of the first call.

    Warnings of the `warnings` module and uncaught exceptions become log lines too, so that every line of the stream is
    a log line. Handlers of other owners on the root logger stay.

    Args:
        run: the run's id.
        service: the member's name, e.g. "rollout-0".
        level: the lowest level that is logged of the mesh's own messages.
        stream: the stream that gets the logs; None for stderr.
    """
    target = stream or sys.stderr
    handler = _MeshHandler(target)
    handler.setFormatter(TerminalFormatter(service) if target.isatty() else JsonFormatter(run, service))
    root = logging.getLogger()
    root.handlers = [other for other in root.handlers if not isinstance(other, _MeshHandler)]
    root.addHandler(handler)
    root.setLevel(level)
    for name in _NOISY:
        library = logging.getLogger(name)
        library.setLevel(max(level, logging.WARNING))
        # A library that is imported already may have set up its own output.
        library.handlers.clear()
        library.propagate = True
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread


def _log_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    logging.getLogger("rollmesh").critical("uncaught exception", exc_info=(kind, error, traceback))


def _log_uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if issubclass(args.exc_type, SystemExit):
        return
    error = args.exc_value or args.exc_type()
    name = args.thread.name if args.thread is not None else "?"
    logging.getLogger("rollmesh").critical("thread %r died", name, exc_info=(args.exc_type, error, args.exc_traceback))


def _timestamp(record: logging.LogRecord) -> str:
    time = datetime.fromtimestamp(record.created, UTC)
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD_ATTRIBUTES}


def _plain(value: Any) -> Any:
    """Return ``value`` in a form that strict JSON can hold. NaN, infinities and unknown objects become text."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
    return str(value)
