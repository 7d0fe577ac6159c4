"""The errors that RollMesh raises on purpose.

::

    RollMeshError
    ├── ConfigError            the user's configuration, files or environment have a fault; the message names the fix
    ├── InvalidArgumentError   a message or a call has a value that can never be accepted
    ├── UnknownMemberError     the caller is not, or no longer, a member of the run
    ├── SupersededError        a call names a lease, a weight epoch or a version that is no longer current
    ├── UnavailableError       the call cannot be answered now, and may be tried again
    ├── DeadlineError          a step of the mesh's own protocol took too long
    ├── WeightTransferError    a transfer failed, or received bytes that differ from the bytes sent
    │   └── TaintedError       a load failed midway: the engine holds parts of two versions
    ├── ReplayError            an answer of Redis breaks the ledger's rules
    ├── StartAgainError        this process cannot go on; a new process in its place may
    └── RunEndedError          the run is over

`rollmesh.rpc.status_codes` translates the errors into gRPC statuses and back.
"""

from __future__ import annotations

import os

EXIT_START_AGAIN = os.EX_TEMPFAIL
"""The exit code, 75, of a process that ended by a `StartAgainError`: whoever started the process may start it again."""


class RollMeshError(Exception):
    """The base of all errors of the mesh."""


class ConfigError(RollMeshError):
    """A fault in the user's configuration, files or environment.

    Args:
        place: the setting that has the fault, as a dotted path; or the file that has the fault.
        problem: the fault, with the value.
        fix: an imperative that says what the user can do.
    """

    def __init__(self, place: str, problem: str, fix: str) -> None:
        super().__init__(f"{place}: {problem}; {fix}")
        self.place = place
        self.problem = problem
        self.fix = fix


class InvalidArgumentError(RollMeshError):
    """A value that can never be accepted. ``field`` is the dotted path of the value."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class UnknownMemberError(RollMeshError):
    """A call from a member that the coordinator does not know; the member has to register."""


class SupersededError(RollMeshError):
    """A call that names a lease, a weight epoch or a version that is no longer current."""


class UnavailableError(RollMeshError):
    """A call that may be tried again, after a pause of at least ``retry_after_s`` seconds."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineError(RollMeshError):
    """A step of the mesh's own protocol that took too long."""


class WeightTransferError(RollMeshError):
    """A transfer that failed, or received bytes that differ from the bytes sent."""


class TaintedError(WeightTransferError):
    """A load that failed midway: the engine holds parts of two versions and may not generate."""


class ReplayError(RollMeshError):
    """An answer of Redis that breaks the ledger's rules."""


class StartAgainError(RollMeshError):
    """An end of this process alone: its engine died, say. A new process in its place may go on with the run.

    The process exits with `EXIT_START_AGAIN`, and the coordinator keeps the run alive.
    """


class RunEndedError(RollMeshError):
    """A call to a run that is over."""
