"""Asynchronous foundations: `supervisor` owns every task, `service` is the frame of a process."""

from rollmesh.aio.service import run_service, stop_signals
from rollmesh.aio.supervisor import Supervisor

__all__ = ["Supervisor", "run_service", "stop_signals"]
