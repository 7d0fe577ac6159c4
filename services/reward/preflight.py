"""Checks the user's reward file before the launcher starts a service: imports the file, and calls it once."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from rollmesh.errors import ConfigError
from services.reward.config import RewardSection
from services.reward.launch import PLACE, find_file
from services.reward.process import CallFault, CallTimeoutError, ProcessLostError, RewardJob, RewardProcess

TRIAL_LIMIT_S = 8.0
"""The longest time for which the check waits for the function."""


@dataclass(frozen=True)
class TrialCall:
    """The arguments of the trial call: a rendered prompt and its label. ``place`` names the row in messages."""

    place: str
    prompt: str
    label_json: str


def check_function(path: Path, section: RewardSection, trial: TrialCall | None) -> str:
    """Import the file in a process of its own, check its ``reward_func``, and call the function once.

    Call this in the main thread.

    Args:
        path: the user's file.
        section: the time limits, and whether the check calls the function.
        trial: the arguments of the call; None does not call the function.

    Returns:
        A phrase that says what the check found.

    Raises:
        ConfigError: the file is missing, cannot be imported in time, or has no usable function; or the call gives no
            reward within the section's ``timeout_s``.
    """
    return asyncio.run(_check(path, find_file(path), section, trial if section.should_probe else None))


async def _check(path: Path, file: Path, section: RewardSection, trial: TrialCall | None) -> str:
    process = await RewardProcess.start(file, section.start_timeout_s)
    try:
        return "reward_func found" if trial is None else await _call(process, path, section.timeout_s, trial)
    finally:
        await process.close()


async def _call(process: RewardProcess, path: Path, timeout_s: float, trial: TrialCall) -> str:
    try:
        job = RewardJob(trial.place, query=trial.prompt, prompt=trial.prompt, label_json=trial.label_json)
        result = await process.call([job], min(timeout_s, TRIAL_LIMIT_S))
    except CallTimeoutError as error:
        if timeout_s > TRIAL_LIMIT_S:
            return f"warning: no reward after {TRIAL_LIMIT_S:g} s; reward.timeout_s lets a call take {timeout_s:g} s"
        fix = "make it faster or raise reward.timeout_s"
        raise _refusal(path, trial, str(error), fix) from error
    except ProcessLostError as error:
        raise _refusal(path, trial, str(error)) from error
    if isinstance(result, CallFault):
        raise _refusal(path, trial, result.reason)
    return "reward_func found, and answers"


def _refusal(path: Path, trial: TrialCall, reason: str, fix: str = "correct it") -> ConfigError:
    problem = f"{path} gives no reward for {trial.place} with an empty answer: {' '.join(reason.split())}"
    return ConfigError(PLACE, problem, f"{fix}, or set reward.should_probe to false")
