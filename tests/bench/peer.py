"""A second process of a bench: a module of this package that talks in JSON lines over its standard streams."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rollmesh.aio.tether import tethered

REPOSITORY = Path(__file__).resolve().parents[2]
_STOP_TIMEOUT_S = 10.0


class Peer:
    """A child process; a context manager that ends it.

    Args:
        command: the arguments of ``python``, or of another interpreter.
        python: that interpreter.
    """

    def __init__(self, command: Sequence[str], python: str = sys.executable) -> None:
        self._process = subprocess.Popen(
            tethered([python, *command]), cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, name="peer answers", daemon=True).start()

    def ask(self, timeout_s: float = 60.0, **question: Any) -> dict[str, Any]:
        """Send a line and wait for the answer.

        Raises:
            RuntimeError: the process ended, or said nothing for ``timeout_s``.
        """
        self.tell(**question)
        return self.answer(timeout_s)

    def tell(self, **line: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()

    def answer(self, timeout_s: float = 60.0) -> dict[str, Any]:
        """The next line. Raises RuntimeError as `ask` does."""
        try:
            answer = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise RuntimeError(f"the second process said nothing for {timeout_s:g} s") from None
        if answer is None:
            raise RuntimeError(f"the second process ended with {self._process.wait(_STOP_TIMEOUT_S)}")
        return answer

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                self._answers.put(json.loads(line))
        self._answers.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_STOP_TIMEOUT_S)


def say(**line: Any) -> None:
    """Answer, in the second process."""
    print(json.dumps(line), flush=True)
