"""Notices services that the coordinator has dropped although their processes run: frozen processes, for example.

A process that is awake sends heartbeats. When the coordinator does not know the process any more, because the process
fell silent or because the coordinator is new, the process registers again within seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from rollmesh.types import MeshStatus
from services.launcher.processes import ServiceProcess

MISSING_S = 20.0
"""Time for which a running process that was a member may be missing. Longer than a worker needs to stop its engine."""


class MissingMembers:
    """The running services that were members once and are none now, and the time since when.

    Args:
        clock: returns the seconds in which the starts of services are measured.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._joined: dict[str, float] = {}
        self._missing_since: dict[str, float] = {}

    def look(self, status: MeshStatus, services: Sequence[ServiceProcess]) -> list[ServiceProcess]:
        """Return the services that have been missing for longer than `MISSING_S`.

        Args:
            status: the coordinator's status while the run goes on.
            services: the services whose processes run.
        """
        now_s = self._clock()
        ages_s = {member.name: member.heartbeat_age_s for member in status.members}
        missing = []
        for service in services:
            name = service.name
            # A heartbeat from before the start is of the former process, which the coordinator has not dropped yet.
            if name in ages_s and now_s - ages_s[name] > service.started_at:
                self._joined[name] = service.started_at
            if name in ages_s or self._joined.get(name) != service.started_at:
                self._missing_since.pop(name, None)
            elif now_s - self._missing_since.setdefault(name, now_s) > MISSING_S:
                missing.append(service)
        return missing
