"""An engine that has died, or makes no tokens while samples wait, ends the worker's process for a new one."""

from __future__ import annotations

import pytest

from rollmesh.errors import StartAgainError
from services.rollout.engine_watch import STALL_MARGIN_S, EngineWatch
from tests.fakes.engine import FakeEngine

STALL_S = 60.0


class _Rig:
    """A watch whose clock, engine and samples the test moves."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.num_waiting = 0
        self.is_loading = False
        self.engine = FakeEngine()
        self.watch = EngineWatch(
            self.engine,  # type: ignore[arg-type]
            lambda: self.num_waiting,
            lambda: self.is_loading,
            STALL_S,
            lambda: self.now_s,
        )

    def look(self, after_s: float) -> None:
        self.now_s += after_s
        self.watch.look()


def test_an_engine_that_makes_no_token_while_samples_wait_is_given_up() -> None:
    rig = _Rig()
    rig.look(0.0)
    rig.num_waiting = 3
    rig.look(STALL_S - 1)
    with pytest.raises(StartAgainError, match="no token for 60 s while 3 samples wait"):
        rig.look(1.0)


def test_an_engine_that_makes_tokens_is_kept_however_long_its_samples_are() -> None:
    rig = _Rig()
    rig.num_waiting = 1
    for _ in range(10):
        rig.engine.num_generated_tokens += 1
        rig.look(STALL_S - 1)


def test_an_idle_engine_is_kept_and_its_idle_time_does_not_count() -> None:
    rig = _Rig()
    rig.look(10 * STALL_S)
    rig.num_waiting = 1
    rig.look(STALL_S - 1)


def test_an_engine_that_loads_weights_is_kept() -> None:
    rig = _Rig()
    rig.num_waiting, rig.is_loading = 1, True
    rig.look(10 * STALL_S)
    rig.is_loading = False
    rig.look(STALL_S - 1)


def test_an_engine_that_died_is_explained() -> None:
    rig = _Rig()
    rig.engine.is_alive = False
    with pytest.raises(StartAgainError, match="vLLM has died: OSError: a cause"):
        rig.look(0.0)


def test_the_coordinator_has_more_patience_than_the_watch_while_samples_wait() -> None:
    rig = _Rig()
    assert rig.watch.patience_s == 0.0
    rig.num_waiting = 1
    assert rig.watch.patience_s == STALL_S + STALL_MARGIN_S
