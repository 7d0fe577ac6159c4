"""The coordinator's section."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from rollmesh.config.section import Section
from rollmesh.config.shared import PositiveFloat, PositiveInt
from rollmesh.errors import ConfigError


class CoordinatorSection(Section):
    address: str = "127.0.0.1:0"
    """host:port it listens on and is reached at; `rollmesh up` replaces port 0 by a free one."""
    heartbeat_interval_s: PositiveFloat = 1.0
    member_timeout_s: PositiveFloat = 30.0
    """A member that was silent for so long is dropped."""
    lease_ttl_s: PositiveFloat = 300.0
    """A group that was not committed for so long is leased again."""
    max_attempts: PositiveInt = 3
    """Leases of one group before it is FAILED."""
    max_version_lag: Annotated[int, Field(ge=0)] = 0
    """Versions that a worker may be behind the committed one and still get leases (d)."""
    max_failed_fraction: Annotated[float, Field(gt=0, le=1)] = 0.1
    """The run stops when more than this part of the groups that ended (and at least a batch of them) FAILED."""
    stall_timeout_s: PositiveFloat = 600.0
    """The run fails, saying who waits for whom, after so long without any progress."""

    @model_validator(mode="after")
    def _check_timeout(self) -> CoordinatorSection:
        if self.member_timeout_s <= 2 * self.heartbeat_interval_s:
            raise ConfigError(
                "coordinator.member_timeout_s",
                f"{self.member_timeout_s:g} is not more than two heartbeats of {self.heartbeat_interval_s:g} s",
                "raise it",
            )
        return self
