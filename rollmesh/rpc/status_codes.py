"""Translates errors of the mesh to gRPC statuses and back. A servicer raises; `rollmesh.rpc.interceptor` translates.

==========================  ====================  ================  ==========================================
raised by a servicer        gRPC status           reason            raised at the caller
==========================  ====================  ================  ==========================================
ConfigError                 INVALID_ARGUMENT      INVALID_ARGUMENT  InvalidArgumentError, field = place
InvalidArgumentError        INVALID_ARGUMENT      INVALID_ARGUMENT  InvalidArgumentError
UnknownMemberError          FAILED_PRECONDITION   UNKNOWN_MEMBER    UnknownMemberError
SupersededError             FAILED_PRECONDITION   SUPERSEDED        SupersededError
UnavailableError            UNAVAILABLE           UNAVAILABLE       UnavailableError
DeadlineError               DEADLINE_EXCEEDED     DEADLINE          DeadlineError
RunEndedError               ABORTED               RUN_ENDED         RunEndedError
TaintedError                DATA_LOSS             TAINTED           TaintedError
WeightTransferError         DATA_LOSS             INTERNAL          WeightTransferError
other RollMeshError         INTERNAL              INTERNAL          RollMeshError
anything else (logged)      INTERNAL              INTERNAL          RollMeshError, without the exception's text
==========================  ====================  ================  ==========================================

A failed call carries an ``ErrorDetail`` in its trailing metadata. A status without ``ErrorDetail`` comes from gRPC
itself or from a foreign server; `error_from_rpc` maps such a status by its code alone. Cancellation passes through on
both sides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from rollmesh.errors import (
    ConfigError,
    DeadlineError,
    InvalidArgumentError,
    RollMeshError,
    RunEndedError,
    SupersededError,
    TaintedError,
    UnavailableError,
    UnknownMemberError,
    WeightTransferError,
)
from rollmesh.v1 import error_pb2

DETAIL_KEY = "rollmesh-error-bin"

_MAX_TEXT_BYTES = 1024
"""The limit of a text in a status. A status travels percent-encoded in HTTP/2 headers, which have 8 KiB in all."""

_Code = grpc.StatusCode

_STATUS: tuple[tuple[type[RollMeshError], grpc.StatusCode, error_pb2.ErrorReason], ...] = (
    (ConfigError, _Code.INVALID_ARGUMENT, error_pb2.ERROR_REASON_INVALID_ARGUMENT),
    (InvalidArgumentError, _Code.INVALID_ARGUMENT, error_pb2.ERROR_REASON_INVALID_ARGUMENT),
    (UnknownMemberError, _Code.FAILED_PRECONDITION, error_pb2.ERROR_REASON_UNKNOWN_MEMBER),
    (SupersededError, _Code.FAILED_PRECONDITION, error_pb2.ERROR_REASON_SUPERSEDED),
    (UnavailableError, _Code.UNAVAILABLE, error_pb2.ERROR_REASON_UNAVAILABLE),
    (DeadlineError, _Code.DEADLINE_EXCEEDED, error_pb2.ERROR_REASON_DEADLINE),
    (RunEndedError, _Code.ABORTED, error_pb2.ERROR_REASON_RUN_ENDED),
    (TaintedError, _Code.DATA_LOSS, error_pb2.ERROR_REASON_TAINTED),
    (WeightTransferError, _Code.DATA_LOSS, error_pb2.ERROR_REASON_INTERNAL),
    (RollMeshError, _Code.INTERNAL, error_pb2.ERROR_REASON_INTERNAL),
)

_LOCAL_WRITE_FAILURE = "Internal error from Core"
"""The text of a write's error, and of the whole call's error afterwards, when the peer has just ended the stream. grpc
reports a cut on this side, whatever the status of the peer was."""
_RETRYABLE = (UnavailableError, DeadlineError)


def status_of(error: RollMeshError) -> tuple[grpc.StatusCode, error_pb2.ErrorDetail]:
    """Return the status and the detail that carry ``error`` to the caller."""
    code, reason = next((code, reason) for kind, code, reason in _STATUS if isinstance(error, kind))
    detail = error_pb2.ErrorDetail(
        reason=reason,
        message=_shorten(str(error)),
        field=_shorten(_field(error)),
        retryable=isinstance(error, _RETRYABLE),
    )
    if isinstance(error, UnavailableError):
        detail.retry_after_ms = min(round(error.retry_after_s * 1000), 2**32 - 1)
    return code, detail


def _field(error: RollMeshError) -> str:
    match error:
        case InvalidArgumentError():
            return error.field
        case ConfigError():
            return error.place
    return ""


def _shorten(text: str) -> str:
    data = text.encode("utf-8", errors="replace")
    if len(data) <= _MAX_TEXT_BYTES:
        return data.decode("utf-8")
    return data[: _MAX_TEXT_BYTES - 3].decode("utf-8", errors="ignore") + "…"


def error_from_rpc(error: grpc.aio.AioRpcError, peer: str = "") -> RollMeshError:
    """Return the error of the mesh for a failed call.

    Args:
        error: the error that the gRPC client raised.
        peer: the name of the peer, for errors that did not come from a servicer of the mesh.
    """
    detail = _detail_of(error)
    if detail is None:
        return _error_without_detail(error, peer)
    match detail.reason:
        case error_pb2.ERROR_REASON_INVALID_ARGUMENT:
            return InvalidArgumentError(detail.message, detail.field)
        case error_pb2.ERROR_REASON_UNKNOWN_MEMBER:
            return UnknownMemberError(detail.message)
        case error_pb2.ERROR_REASON_SUPERSEDED:
            return SupersededError(detail.message)
        case error_pb2.ERROR_REASON_UNAVAILABLE:
            return UnavailableError(detail.message, detail.retry_after_ms / 1000)
        case error_pb2.ERROR_REASON_DEADLINE:
            return DeadlineError(detail.message)
        case error_pb2.ERROR_REASON_RUN_ENDED:
            return RunEndedError(detail.message)
        case error_pb2.ERROR_REASON_TAINTED:
            return TaintedError(detail.message)
    if error.code() is _Code.DATA_LOSS:
        return WeightTransferError(detail.message)
    # An unknown reason comes from a newer peer. The flag ``retryable`` says how to treat the error.
    return (
        UnavailableError(detail.message, detail.retry_after_ms / 1000)
        if detail.retryable
        else RollMeshError(detail.message)
    )


def _detail_of(error: grpc.aio.AioRpcError) -> error_pb2.ErrorDetail | None:
    for key, value in error.trailing_metadata() or ():
        if key == DETAIL_KEY and isinstance(value, bytes):
            try:
                detail: error_pb2.ErrorDetail = error_pb2.ErrorDetail.FromString(value)
                return detail
            except DecodeError:
                return None
    return None


def _error_without_detail(error: grpc.aio.AioRpcError, peer: str) -> RollMeshError:
    code, text = error.code(), error.details() or "no further details"
    if code is _Code.UNAVAILABLE and text.startswith("failed to connect"):
        text = f"no connection, {text.rpartition(': ')[2]}"  # without gRPC's list of the addresses that it tried
    message = f"{peer}: {text} ({code.name})" if peer else f"{text} ({code.name})"
    match code:
        case _Code.DEADLINE_EXCEEDED:
            return DeadlineError(message)
        case _Code.INVALID_ARGUMENT | _Code.OUT_OF_RANGE:
            return InvalidArgumentError(message)
        case _Code.RESOURCE_EXHAUSTED if "larger than max" in text:
            return InvalidArgumentError(message)
        case _Code.UNAVAILABLE | _Code.RESOURCE_EXHAUSTED | _Code.CANCELLED:
            return UnavailableError(message)
        case _Code.INTERNAL if text == _LOCAL_WRITE_FAILURE:
            return UnavailableError(message)
    return RollMeshError(message)


def raise_for_status(error: grpc.aio.AioRpcError, peer: str = "") -> NoReturn:
    """Raise the error of the mesh for ``error``."""
    raise error_from_rpc(error, peer) from error


@contextlib.contextmanager
def translate_errors(peer: str = "") -> Iterator[None]:
    """Turn the statuses of the calls in the block into errors of the mesh. ``peer`` names the peer."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise_for_status(error, peer)
