"""The reward service's section."""

from __future__ import annotations

from pathlib import Path

from rollmesh.config.section import Section
from rollmesh.config.shared import PositiveFloat, PositiveInt


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
