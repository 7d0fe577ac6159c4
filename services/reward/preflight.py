"""A check of the user's reward file that the launcher makes before it starts anything."""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path

from services.reward.launch import (
    LENGTH,
    MAX_REPLY_BYTES,
    check_hello,
    decode,
    died_in_import,
    find_file,
    import_timed_out,
    launch,
)


def check_function(path: Path, timeout_s: float) -> None:
    """Import the file in a process of its own and check the signature of its ``reward_func``, without calling it.

    Raises:
        ConfigError: the file is missing, cannot be imported, has no usable function, or importing it takes longer than
            ``timeout_s``.
    """
    file = find_file(path)
    deadline = time.monotonic() + timeout_s
    child = launch(file, subprocess.DEVNULL)
    try:
        head = _receive(child.connection, LENGTH.size, deadline)
        length = LENGTH.unpack(head)[0]
        check_hello(path, decode(_receive(child.connection, min(length, MAX_REPLY_BYTES), deadline)))
    except TimeoutError:
        raise import_timed_out(path, timeout_s) from None
    except (OSError, EOFError, ValueError):
        raise died_in_import(path, child.exit_reason(grace_s=1.0)) from None
    finally:
        child.end()
        child.connection.close()


def _receive(connection: socket.socket, length: int, deadline: float) -> bytes:
    data = b""
    while len(data) < length:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        connection.settimeout(left_s)
        more = connection.recv(length - len(data))
        if not more:
            raise EOFError
        data += more
    return data
