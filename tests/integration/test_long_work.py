"""A whole mesh in which a group takes much longer than a lease lasts, and which is frozen in the middle."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.integration.mesh_runs import finish_mesh, processes_of, service_logs, start_mesh

pytestmark = [pytest.mark.mesh, pytest.mark.timeout(600)]

# The engine generates one sample at a time. So the last of the 64 samples of the first leases waits for all the others.
SLOW = ["training.prompts_per_step=4", "training.samples_per_prompt=8", "rollout.engine.max_num_seqs=1"]
SHORT = ["coordinator.heartbeat_interval_s=0.2", "coordinator.lease_ttl_s=2", "coordinator.member_timeout_s=5"]
FREEZE_S = 7.0


def _wait_for(path: Path, text: str, timeout_s: float = 150.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < deadline, f"{path} has no {text!r}\n{service_logs(path.parent)}"
        time.sleep(0.2)


def test_long_groups_are_trained_at_their_first_try_and_a_frozen_mesh_goes_on(demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "slow"
    overrides = ["run.name=slow", *SLOW, *SHORT, "training.steps=3", "training.max_staleness=1", "evaluation=null"]
    process = start_mesh(demo, tmp_path, overrides)
    _wait_for(folder / "metrics.jsonl", '"step": 1')
    log = folder / "logs" / "coordinator.log"
    assert "expired" not in log.read_text()
    frozen = processes_of(folder.parent)
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(FREEZE_S)
    for pid in frozen:
        os.kill(pid, signal.SIGCONT)
    run = finish_mesh(process, folder, 120)
    assert run.exit_code == 0, f"{run.output}\n{service_logs(folder)}"
    assert "the coordinator was stopped for" in log.read_text()
    assert run.accounting["num_groups"]["failed"] == 0
    assert run.accounting["num_trained"] == 3 * 4
