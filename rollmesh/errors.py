"""Every error that RollMesh raises on purpose.

::

    RollMeshError
    ├── ConfigError            the user's configuration, files or environment; the message names the fix
    ├── InvalidArgumentError   a message or call with a value that can never be accepted
    ├── UnknownMemberError     the caller is not, or no longer, a member of the run
    ├── SupersededError        a lease, weight epoch or version that is no longer the current one
    ├── UnavailableError       not now; may be tried again
    ├── DeadlineError          a step of the mesh's own protocol took too long
    ├── WeightTransferError    a transfer failed or its bytes did not match
    │   └── TaintedError       a load failed midway: the engine holds parts of two versions
    ├── ReplayError            Redis answered something that must not be
    └── RunEndedError          the run is over

`rollmesh.rpc.status_codes` maps them to gRPC statuses and back.
"""

from __future__ import annotations


class RollMeshError(Exception):
    """The root of the tree."""


class ConfigError(RollMeshError):
    """The user's configuration, files or environment are at fault.

    Args:
        place: what is wrong: a dotted configuration path or a file.
        problem: what is wrong with it, with the value.
        fix: what to do, as an imperative.
    """

    def __init__(self, place: str, problem: str, fix: str) -> None:
        super().__init__(f"{place}: {problem}; {fix}")
        self.place = place
        self.problem = problem
        self.fix = fix


class InvalidArgumentError(RollMeshError):
    """A value that can never be accepted; ``field`` is its dotted path."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class UnknownMemberError(RollMeshError):
    """The caller has to register (again)."""


class SupersededError(RollMeshError):
    """Names a lease, weight epoch or version that is no longer the current one."""


class UnavailableError(RollMeshError):
    """May be tried again, after ``retry_after_s`` if that is not 0."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineError(RollMeshError):
    """A step of the mesh's own protocol took too long."""


class WeightTransferError(RollMeshError):
    """A transfer failed, or the bytes received are not those sent."""


class TaintedError(WeightTransferError):
    """A load failed midway: the engine holds parts of two versions and must not generate any more."""


class ReplayError(RollMeshError):
    """Redis answered something that must not be."""


class RunEndedError(RollMeshError):
    """The run is over."""
