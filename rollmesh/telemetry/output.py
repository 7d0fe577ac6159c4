"""Output that may lose its reader: a pipe whose reader went away, a closed terminal, a full disk.

`install` replaces stdout and stderr of the process once, at its start. From then on every ``print`` follows these
rules:

* A reader that went away (EPIPE, EIO, ENXIO) does not end the process. Later output is dropped in silence.
* A full disk is an error where the output is the result of the command (`config schema > file`). It is ignored where
  the output only tells of the work (`up`, a service): `install(is_dispensable=True)`.
* A character that the encoding lacks is replaced by a plain character, or by its number.
"""

from __future__ import annotations

import codecs
import errno
import io
import sys
from typing import Any, TextIO

from rollmesh.errors import ConfigError

GONE = frozenset({errno.EPIPE, errno.EIO, errno.ENXIO})
"""The errors of a write to a pipe without a reader, and of a write to a closed terminal."""

_PLAIN = {"·": "-", "—": "-", "–": "-", "→": "->", "±": "+-", "…": "...", "η": "eta", "π": "pi", "μ": "mu"}
_ERRORS = "rollmesh-plain"


class PatientOutput(io.FileIO):
    """A file descriptor for writing, whose reader may go away.

    Args:
        descriptor: the descriptor. It stays open when this object is closed.
        is_dispensable: whether other errors of a write, such as a full disk, are ignored too. Otherwise such an error
            is a ConfigError.
    """

    def __init__(self, descriptor: int, is_dispensable: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.is_dispensable = is_dispensable

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in GONE and not self.is_dispensable:
                self.is_dispensable = True  # the buffer is written again at the end of the process: no second error
                problem = f"cannot be written ({error.strerror})"
                raise ConfigError("output", problem, "make room for it, or send it elsewhere") from error
            return memoryview(data).nbytes


def install(*, is_dispensable: bool = False) -> None:
    """Replace stdout and stderr by streams that write to a `PatientOutput`.

    A stream that is not descriptor 1 or 2 of the process, such as the stream of a test, stays as it is. A second call
    only sets ``is_dispensable``.
    """
    codecs.register_error(_ERRORS, _plain)
    sys.stdout = _patient(sys.stdout, is_dispensable)
    sys.stderr = _patient(sys.stderr, is_dispensable)


def _patient(stream: TextIO | None, is_dispensable: bool) -> TextIO:
    if stream is None:  # The descriptor is closed: no reader is left.
        return io.StringIO()
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # with PYTHONUNBUFFERED the stream has no buffer
    if isinstance(raw, PatientOutput):
        raw.is_dispensable = is_dispensable
        return stream
    if not isinstance(raw, io.FileIO) or raw.fileno() not in (1, 2):
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(PatientOutput(raw.fileno(), is_dispensable)),
        encoding=stream.encoding,
        errors=_ERRORS,
        line_buffering=getattr(stream, "line_buffering", False),
        write_through=getattr(stream, "write_through", False),
    )


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """Return a plain spelling of one character that the encoding lacks, for `codecs.register_error`.

    Where the character stands for a byte of a file name that is no text, return this byte.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":
        return bytes([ord(character) - 0xDC00]), error.start + 1
    escaped = character.encode("ascii", "backslashreplace").decode("ascii")
    return _PLAIN.get(character, escaped), error.start + 1
