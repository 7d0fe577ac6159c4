"""The coordinator's section."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from rollmesh.config.section import Section
from rollmesh.config.shared import NonNegativeInt, PositiveFloat, PositiveInt
from rollmesh.errors import ConfigError


class CoordinatorSection(Section):
    address: str = "127.0.0.1:0"
    """host:port it listens on and is reached at; `rollmesh up` replaces port 0 by a free one."""
    heartbeat_interval_s: PositiveFloat = 1.0
    """Seconds between two heartbeats of a member. More than 200 members send them less often, down to six in
    member_timeout_s."""
    member_timeout_s: PositiveFloat = 30.0
    """A member that was silent for so long is dropped."""
    lease_ttl_s: PositiveFloat = 300.0
    """Seconds that a lease lives from its last renewal. Workers renew their leases as long as their work moves, so that
    this is no limit for a group; it is how long a group stays with a worker from which nothing is heard."""
    max_attempts: PositiveInt = 3
    """Leases of one group before it is FAILED."""
    max_version_lag: NonNegativeInt = 0
    """Versions that a worker may be behind the committed one and still get leases (d)."""
    max_failed_fraction: Annotated[float, Field(gt=0, le=1)] = 0.1
    """The run stops when more than this part of the groups that ended (and at least a batch of them) FAILED."""
    stall_timeout_s: PositiveFloat = 600.0
    """Seconds without any progress after which a worker gives back its groups, and the run fails, saying who waits for
    whom. Tokens, scores, training passes, weights and bytes of a checkpoint are progress; see also
    learner.silent_work_timeout_s."""

    @model_validator(mode="after")
    def _check_timeout(self) -> CoordinatorSection:
        if self.member_timeout_s <= 2 * self.heartbeat_interval_s:
            raise ConfigError(
                "coordinator.member_timeout_s",
                f"{self.member_timeout_s:g} is not more than two heartbeats of {self.heartbeat_interval_s:g} s",
                "raise it",
            )
        if self.lease_ttl_s <= 3 * self.heartbeat_interval_s:
            raise ConfigError(
                "coordinator.lease_ttl_s",
                f"{self.lease_ttl_s:g} is not more than three heartbeats of {self.heartbeat_interval_s:g} s, which "
                "renew the leases",
                "raise it",
            )
        return self
