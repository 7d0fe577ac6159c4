"""Which interface carries the weights follows from the learner's address, and nothing listens on another one."""

from __future__ import annotations

import os

import pytest

from rollmesh.errors import ConfigError
from rollmesh.weights.interface import address_towards, interface_of, keep_to_interface

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "")  # has the variable restored, whatever the test does to it
        monkeypatch.delenv(variable)


def test_a_learner_on_this_machine_is_reached_from_its_own_address() -> None:
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"


def test_an_address_of_another_machine_has_no_interface_here() -> None:
    assert interface_of("192.0.2.1") is None


def test_gloo_and_nccl_keep_to_the_interface() -> None:
    keep_to_interface("localhost")
    assert [os.environ[variable] for variable in VARIABLES] == ["lo", "=lo"]


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    keep_to_interface("127.0.0.1")
    assert [os.environ[variable] for variable in VARIABLES] == ["lo", "ib0"]


def test_a_host_that_nobody_knows_is_the_configurations_fault() -> None:
    with pytest.raises(ConfigError, match=r"weights\.host: no route leads to 'no-such-host\.invalid'"):
        keep_to_interface("no-such-host.invalid")
