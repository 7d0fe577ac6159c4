"""The reward service's section."""

from __future__ import annotations

from pathlib import Path

from rollmesh.config.section import Section
from rollmesh.config.shared import PositiveFloat, PositiveInt
from rollmesh.errors import ConfigError


class RewardSection(Section):
    address: str = "127.0.0.1:0"
    """host:port of the reward server. With `function` it is started there; without, it is yours and runs already."""
    function: Path | None = None
    """A Python file with `reward_func(queries, prompts, labels)`."""
    timeout_s: PositiveFloat = 30.0
    """Time one call of the function may take; then its process is ended and started again."""
    num_processes: PositiveInt = 1
    """Processes that run the function side by side."""
    samples_per_call: PositiveInt = 1
    """Samples handed to one call of the function; OpenRLHF's functions expect 1."""
    start_timeout_s: PositiveFloat = 60.0
    """Time importing the file may take."""
    should_probe: bool = True
    """Call the function once before anything starts, on the first prompt with an empty answer, so that a fault of it is
    found at once. Switch it off for a judge that costs money, or that cannot bear an empty answer."""

    def check_is_given(self) -> None:
        """Raises ConfigError if the mesh would have no rewards: neither a function nor a server."""
        if self.function is None and self.address.endswith(":0"):
            raise ConfigError(
                "reward", "has neither a `function` file nor the `address` of a running server", "set one of them"
            )

    def check_is_awaited(self, scoring_timeout_s: float) -> None:
        """Raises ConfigError if workers give a sample up (rollout.scoring_timeout_s) before its call times out."""
        if self.function is not None and self.timeout_s >= scoring_timeout_s:
            raise ConfigError(
                "rollout.scoring_timeout_s",
                f"{scoring_timeout_s:g} s are over before one call of {self.timeout_s:g} s (reward.timeout_s) is, and "
                "nobody would hear why",
                "raise the one or lower the other",
            )
