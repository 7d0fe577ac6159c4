"""Writes the lines that the user's code prints to the service's log."""

from __future__ import annotations

import asyncio
import logging
import os
import time

_logger = logging.getLogger(__name__)

MAX_LINE_BYTES = 2000
LINES_PER_S = 100
_CHUNK_BYTES = 65536
_MAX_DRAIN_BYTES = 1024 * 1024


class OutputLog:
    """Reads one child's standard output and error from a pipe and logs the lines.

    The log always empties the pipe; otherwise a function that prints a lot would block in ``print``. The log shows at
    most `LINES_PER_S` lines a second, cuts each line to `MAX_LINE_BYTES`, and counts the lines that it leaves out.

    ``write_fd`` is the child's end of the pipe. Call `child_started` when the child holds ``write_fd``.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._read_fd, self.write_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        self._line = bytearray()
        self._window = 0.0
        self._num_logged = 0
        self._num_left_out = 0

    def child_started(self) -> None:
        """Start reading, and close the parent's copy of the child's end, so that the end of the child ends the pipe."""
        os.close(self.write_fd)
        self.write_fd = -1
        asyncio.get_running_loop().add_reader(self._read_fd, self._on_readable)

    def close(self) -> None:
        """Log the rest of the pipe, and close the pipe. Safe to repeat."""
        if self._read_fd < 0:
            return
        asyncio.get_running_loop().remove_reader(self._read_fd)
        num_bytes = 0
        while num_bytes < _MAX_DRAIN_BYTES and (data := self._read()):
            num_bytes += len(data)
            self.feed(data)
        if self._line:
            self.feed(b"\n")
        self._report_left_out()
        os.close(self._read_fd)
        self._read_fd = -1
        if self.write_fd >= 0:
            os.close(self.write_fd)

    def _read(self) -> bytes:
        try:
            return os.read(self._read_fd, _CHUNK_BYTES)
        except BlockingIOError:
            return b""

    def _on_readable(self) -> None:
        data = self._read()
        if data:
            self.feed(data)
        else:  # the end of the pipe; with a reader the loop would call this method again at once
            asyncio.get_running_loop().remove_reader(self._read_fd)

    def feed(self, data: bytes) -> None:
        """Take further bytes, and log the complete lines."""
        start = 0
        while (end := data.find(b"\n", start)) >= 0:
            if not self._may_log():
                num_lines = data.count(b"\n", start)
                self._num_left_out += num_lines
                start = data.rfind(b"\n") + 1
                self._line.clear()
                break
            self._keep(data[start:end])
            self._log_line()
            start = end + 1
        self._keep(data[start:])

    def _keep(self, part: bytes) -> None:
        room = MAX_LINE_BYTES + 1 - len(self._line)
        self._line += part[: max(0, room)]

    def _may_log(self) -> bool:
        now = time.monotonic()
        if now - self._window >= 1.0:
            self._report_left_out()
            self._window, self._num_logged = now, 0
        self._num_logged += 1
        return self._num_logged <= LINES_PER_S

    def _log_line(self) -> None:
        text = self._line[:MAX_LINE_BYTES].decode("utf-8", "replace").rstrip()
        is_cut = len(self._line) > MAX_LINE_BYTES
        self._line.clear()
        if text:
            _logger.info("%s%s", text, "…" if is_cut else "", extra={"source": self._name})

    def _report_left_out(self) -> None:
        if self._num_left_out:
            _logger.info("%d further lines printed by %s are not shown", self._num_left_out, self._name)
            self._num_left_out = 0
