"""The coordinator's section of the mesh file."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from rollmesh.config.section import Section
from rollmesh.config.shared import NonNegativeInt, PositiveFloat, PositiveInt
from rollmesh.errors import ConfigError


class CoordinatorSection(Section):
    """Settings of the coordinator."""

    address: str = "127.0.0.1:0"
    """The host:port that the coordinator listens on, and at which members reach it. `rollmesh up` replaces port 0 by a
    free port."""
    heartbeat_interval_s: PositiveFloat = 1.0
    """Seconds between two heartbeats of a member. If there are more than 200 members, each sends heartbeats less often,
    but at least six in member_timeout_s."""
    member_timeout_s: PositiveFloat = 30.0
    """Seconds of silence after which a member is dropped."""
    lease_ttl_s: PositiveFloat = 300.0
    """Seconds that a lease lives from its last renewal. A worker renews its leases as long as its work moves, so a slow
    group may take longer. A group stays with a silent worker for this time."""
    max_attempts: PositiveInt = 3
    """The number of leases of one group. If the last lease ends without the group, the group is FAILED."""
    max_version_lag: NonNegativeInt = 0
    """The number of versions that a worker may be behind the committed version and still get leases (d)."""
    max_failed_fraction: Annotated[float, Field(gt=0, le=1)] = 0.1
    """The largest share of FAILED groups among all groups that ended. The run fails if the share is larger and at least
    a batch of groups FAILED."""
    stall_timeout_s: PositiveFloat = 600.0
    """Seconds without progress after which a worker gives back its groups and the run fails. The error says who waits
    for whom. Tokens, scores, training passes, weights and bytes of a checkpoint are progress; see also
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
