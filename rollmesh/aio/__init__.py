"""Asynchronous foundations of a process.

`supervisor` owns every task. `service` runs the event loop of a service. `awake` measures time without a process's
sleep. `keeper` runs commands and kills what they leave behind.
"""

from rollmesh.aio.service import run_service, stop_signals
from rollmesh.aio.supervisor import Supervisor

__all__ = ["Supervisor", "run_service", "stop_signals"]
