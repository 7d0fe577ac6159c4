"""The reward service's section of the mesh file."""

from __future__ import annotations

from pathlib import Path

from rollmesh.config.section import Section
from rollmesh.config.shared import PositiveFloat, PositiveInt
from rollmesh.errors import ConfigError


class RewardSection(Section):
    """Settings of the reward service, which scores samples."""

    address: str = "127.0.0.1:0"
    """The host:port of the reward server. With `function` the mesh starts the server there. Without `function` the
    address names a server of yours that runs already."""
    function: Path | None = None
    """A Python file with `reward_func(queries, prompts, labels)`; with null the rewards come from the server at
    `address`."""
    timeout_s: PositiveFloat = 30.0
    """Seconds that one call of the function may take. After that the service ends the process of the call and starts a
    new process."""
    num_processes: PositiveInt = 1
    """The number of processes that run the function side by side."""
    samples_per_call: PositiveInt = 1
    """The most samples of one call of the function. OpenRLHF's functions expect 1."""
    start_timeout_s: PositiveFloat = 60.0
    """Seconds that the import of the file may take."""
    should_probe: bool = True
    """Call the function once before the services start, with the first prompt and an empty answer, to find a fault of
    the function at once. Switch this off for a judge that costs money, or that fails on an empty answer."""

    def check_is_given(self) -> None:
        """Raise ConfigError if the mesh has no rewards: the file names neither a function nor a server."""
        if self.function is None and self.address.endswith(":0"):
            raise ConfigError(
                "reward", "has neither a `function` file nor the `address` of a running server", "set one of them"
            )

    def check_is_awaited(self, scoring_timeout_s: float) -> None:
        """Raise ConfigError if a worker gives a sample up (rollout.scoring_timeout_s) before the sample's call times
        out."""
        if self.function is not None and self.timeout_s >= scoring_timeout_s:
            raise ConfigError(
                "rollout.scoring_timeout_s",
                f"workers give a sample up after {scoring_timeout_s:g} s, before its call times out after "
                f"{self.timeout_s:g} s (reward.timeout_s)",
                "raise rollout.scoring_timeout_s or lower reward.timeout_s",
            )
