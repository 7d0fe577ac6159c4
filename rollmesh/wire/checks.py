"""Checks that every reader of the wire shares, and the conversions that are not plain copies.

Readers (``*_from_proto``) refuse what can never be accepted with an `InvalidArgumentError` that names the dotted path
of the field, and do so before anything is allocated whose size the sender chose. Writers (``*_to_proto``) apply the
same checks where Python's types are wider than the wire's.
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
    """The dotted path of ``name`` inside ``parent``, which is "" for the message itself."""
    return f"{parent}.{name}" if parent else name


def required(message: Any, name: str, parent: str = "") -> Any:
    """The submessage ``name``, which must be present."""
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
    """A name, id or address: short, not empty, and in one line.

    Names go into keys of Redis, which separates them by NUL, into log lines and into tables: a control character would
    make one name look like two, or one line like many.
    """
    if not value:
        refuse(field, "is empty")
    if (found := _CONTROL.search(value)) is not None:
        refuse(field, f"{value[:80]!r} has the control character {found[0]!r}")
    return text(value, field, MAX_NAME_BYTES)


def text(value: str, field: str, limit: int = MAX_TEXT_BYTES) -> str:
    """``value`` if it has at most ``limit`` bytes in UTF-8."""
    # A character has four bytes at most, so that most texts need not be encoded to be measured.
    if len(value) * 4 > limit and len(value.encode()) > limit:
        refuse(field, f"has more than {limit} bytes")
    return value


def finite(value: float, field: str) -> float:
    if not math.isfinite(value):
        refuse(field, f"is {value}, not a finite number")
    return value


def float32(value: float, field: str) -> float:
    """``value`` if float32 can hold it as a finite number; protobuf would turn a larger one into infinity."""
    if not abs(value) <= _MAX_FLOAT32:
        refuse(field, f"is {value}, not a finite float32")
    return value


def shortest(value: float) -> float:
    """The shortest decimal that float32 rounds to ``value``.

    Settings such as a temperature of 0.7 cross the wire as float32; reading them back this way gives 0.7 again and
    not 0.699999988079071, so that both ends compute with the same number.
    """
    return float(str(np.float32(value)))


def named_numbers(values: Mapping[str, float], field: str) -> dict[str, float]:
    """A map of finite numbers, copied."""
    at_most(values, MAX_NAMED_NUMBERS, field)
    return {name(key, field): finite(value, f"{field}[{key}]") for key, value in values.items()}


def digest(value: bytes, field: str) -> bytes:
    if len(value) != DIGEST_BYTES:
        refuse(field, f"has {len(value)} bytes, not the {DIGEST_BYTES} of a SHA-256")
    return value


def milliseconds(seconds: float, field: str) -> int:
    """Seconds as the wire's uint32: a positive time is at least 1 ms, and 49 days stand for anything longer."""
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
    """``array`` as little-endian int32, whatever the host."""
    return array.astype("<i4", casting="same_kind", copy=False).tobytes()


def pack_float32(array: Float32Array) -> bytes:
    """``array`` as little-endian float32, whatever the host."""
    return array.astype("<f4", casting="same_kind", copy=False).tobytes()


def token_ids(data: bytes, field: str) -> Int32Array:
    """int32 [N], not negative, read-only. ``data`` is a bytes field that the caller has read once."""
    _check_length(data, field)
    array = np.frombuffer(data, dtype="<i4").astype(np.int32, copy=False)
    if array.size and (lowest := int(array.min())) < 0:
        refuse(field, f"holds the token id {lowest}")
    return array


def logprobs(data: bytes, field: str) -> Float32Array:
    """float32 [N], finite, read-only. ``data`` is a bytes field that the caller has read once."""
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
