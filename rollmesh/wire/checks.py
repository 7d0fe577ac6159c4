"""Checks that all readers of the wire share, and conversions that are more than copies.

A reader (``*_from_proto``) refuses a bad value with an `InvalidArgumentError` that names the dotted path of the field.
The reader refuses the value before it allocates anything whose size the sender chose. A writer (``*_to_proto``) makes
the same checks where Python's types are wider than the types of the wire.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sized
from typing import Any, NoReturn

import numpy as np

from rollmesh.errors import InvalidArgumentError
from rollmesh.types import Float32Array, Int32Array
from rollmesh.wire.limits import DIGEST_BYTES, MAX_NAME_BYTES, MAX_NAMED_NUMBERS, MAX_TEXT_BYTES, MAX_TOKENS

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_ITEM_BYTES = 4
_MAX_FLOAT32 = float(np.finfo(np.float32).max)
_MAX_UINT32 = 2**32 - 1


def refuse(field: str, problem: str) -> NoReturn:
    """Raise the error for ``field``, a dotted path; ``problem`` completes the sentence "<field> ..."."""
    raise InvalidArgumentError(f"{field} {problem}", field)


def join(parent: str, name: str) -> str:
    """Return the dotted path of ``name`` inside ``parent``. ``parent`` is "" for the message itself."""
    return f"{parent}.{name}" if parent else name


def required(message: Any, name: str, parent: str = "") -> Any:
    """Return the submessage ``name``, which must be present."""
    if not message.HasField(name):
        refuse(join(parent, name), "is missing")
    return getattr(message, name)


def at_most(items: Sized, limit: int, field: str) -> None:
    if len(items) > limit:
        refuse(field, f"has {len(items)} entries, more than {limit}")


def between(value: int, low: int, high: int, field: str) -> int:
    if not low <= value <= high:
        refuse(field, f"is {value}, not within {low} and {high}")
    return value


def name(value: str, field: str) -> str:
    """Return a name, an id or an address, which must be short, not empty, and in one line.

    Names go into keys of Redis that separate names by NUL, into log lines and into tables. A control character would
    make one name look like two names, or one line like many lines.
    """
    if not value:
        refuse(field, "is empty")
    if (found := _CONTROL.search(value)) is not None:
        refuse(field, f"{value[:80]!r} has the control character {found[0]!r}")
    return text(value, field, MAX_NAME_BYTES)


def text(value: str, field: str, limit: int = MAX_TEXT_BYTES) -> str:
    """Return ``value``, which may have at most ``limit`` bytes in UTF-8."""
    # A character has at most four bytes, so most texts need no encoding to be measured.
    if len(value) * 4 > limit and len(value.encode()) > limit:
        refuse(field, f"has more than {limit} bytes")
    return value


def finite(value: float, field: str) -> float:
    if not math.isfinite(value):
        refuse(field, f"is {value}, not a finite number")
    return value


def float32(value: float, field: str) -> float:
    """Return ``value``, which float32 must hold as a finite number. protobuf would turn a larger value into
    infinity."""
    if not abs(value) <= _MAX_FLOAT32:
        refuse(field, f"is {value}, not a finite float32")
    return value


def shortest(value: float) -> float:
    """Return the shortest decimal that float32 rounds to ``value``.

    A setting such as a temperature of 0.7 crosses the wire as float32. This function reads it back as 0.7 and not as
    0.699999988079071, so that both ends compute with the same number.
    """
    return float(str(np.float32(value)))


def named_numbers(values: Mapping[str, float], field: str) -> dict[str, float]:
    """Return a copy of a map of finite numbers."""
    at_most(values, MAX_NAMED_NUMBERS, field)
    return {name(key, field): finite(value, f"{field}[{key}]") for key, value in values.items()}


def digest(value: bytes, field: str) -> bytes:
    if len(value) != DIGEST_BYTES:
        refuse(field, f"has {len(value)} bytes, not the {DIGEST_BYTES} of a SHA-256")
    return value


def milliseconds(seconds: float, field: str) -> int:
    """Return a time in milliseconds, as uint32. A positive time is at least 1 ms; 49 days stand for any longer time."""
    if not seconds >= 0:
        refuse(field, f"is {seconds} s, not a time")
    if seconds * 1000 >= _MAX_UINT32:
        return _MAX_UINT32
    return max(1, round(seconds * 1000)) if seconds > 0 else 0


def positive_seconds(num_milliseconds: int, field: str) -> float:
    if num_milliseconds == 0:
        refuse(field, "is 0, not a time")
    return num_milliseconds / 1000


def pack_int32(array: Int32Array) -> bytes:
    """Return the bytes of ``array`` as little-endian int32, on any host."""
    return array.astype("<i4", casting="same_kind", copy=False).tobytes()


def pack_float32(array: Float32Array) -> bytes:
    """Return the bytes of ``array`` as little-endian float32, on any host."""
    return array.astype("<f4", casting="same_kind", copy=False).tobytes()


def token_ids(data: bytes, field: str) -> Int32Array:
    """Return int32 [N], not negative and read-only. ``data`` is a bytes field that the caller has read once."""
    _check_length(data, field)
    array = np.frombuffer(data, dtype="<i4").astype(np.int32, copy=False)
    if array.size and (lowest := int(array.min())) < 0:
        refuse(field, f"holds the token id {lowest}")
    return array


def logprobs(data: bytes, field: str) -> Float32Array:
    """Return float32 [N], finite and read-only. ``data`` is a bytes field that the caller has read once."""
    _check_length(data, field)
    array = np.frombuffer(data, dtype="<f4").astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        refuse(field, "holds a number that is not finite")
    return array


def _check_length(data: bytes, field: str) -> None:
    if len(data) % _ITEM_BYTES:
        refuse(field, f"has {len(data)} bytes, not a multiple of {_ITEM_BYTES}")
    if len(data) > MAX_TOKENS * _ITEM_BYTES:
        refuse(field, f"has {len(data) // _ITEM_BYTES} entries, more than {MAX_TOKENS}")
