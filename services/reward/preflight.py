"""A check of the user's reward file that the launcher makes before it starts anything: import, and one call."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from rollmesh.errors import ConfigError
from services.reward.config import RewardSection
from services.reward.launch import PLACE, find_file
from services.reward.process import CallFault, CallTimeoutError, ProcessLostError, RewardProcess, Work

PROBE_LIMIT_S = 8.0
"""A function that may take longer than this is not waited for."""


@dataclass(frozen=True)
class Probe:
    """What the function is called with: a prompt as rendered, and its label. ``place`` names the row in messages."""

    place: str
    prompt: str
    label_json: str


def check_function(path: Path, section: RewardSection, probe: Probe | None) -> str:
    """Import the file in a process of its own, check its ``reward_func``, and call it once. Needs the main thread.

    Args:
        path: the user's file.
        section: time limits, and whether to call the function at all.
        probe: None does not call it.

    Returns:
        What is known of the function now.

    Raises:
        ConfigError: the file is missing, cannot be imported in time, or has no usable function; or the call gives no
            reward within the section's ``timeout_s``.
    """
    return asyncio.run(_check(path, find_file(path), section, probe if section.should_probe else None))


async def _check(path: Path, file: Path, section: RewardSection, probe: Probe | None) -> str:
    process = await RewardProcess.start(file, section.start_timeout_s)
    try:
        return "reward_func found" if probe is None else await _call(process, path, section.timeout_s, probe)
    finally:
        await process.close()


async def _call(process: RewardProcess, path: Path, timeout_s: float, probe: Probe) -> str:
    try:
        work = Work(probe.place, query=probe.prompt, prompt=probe.prompt, label_json=probe.label_json)
        result = await process.call([work], min(timeout_s, PROBE_LIMIT_S))
    except CallTimeoutError as error:
        if timeout_s > PROBE_LIMIT_S:
            return f"warning: no reward after {PROBE_LIMIT_S:g} s; reward.timeout_s lets a call take {timeout_s:g} s"
        fix = "make it faster or raise reward.timeout_s"
        raise _refusal(path, probe, str(error), fix) from error
    except ProcessLostError as error:
        raise _refusal(path, probe, str(error)) from error
    if isinstance(result, CallFault):
        raise _refusal(path, probe, result.reason)
    return "reward_func found, and answers"


def _refusal(path: Path, probe: Probe, reason: str, fix: str = "correct it") -> ConfigError:
    problem = f"{path} gives no reward for {probe.place} with an empty answer: {' '.join(reason.split())}"
    return ConfigError(PLACE, problem, f"{fix}, or set reward.should_probe to false")
