"""The checks that services make of their own sections of a mesh file, gathered for the launcher.

`services.config` gathers the sections in the same way. This module imports neither torch, transformers, vLLM nor
DeepSpeed.
"""

from __future__ import annotations

from services.reward.config import RewardSection as RewardSection
from services.reward.preflight import TrialCall, check_function
from services.rollout.preflight import check_engine as check_engine


def check_reward_function(
    section: RewardSection, place: str = "", prompt: str | None = None, label_json: str = ""
) -> str:
    """Import the user's reward function in a process of its own, and call the function once.

    Only the main thread may call this check.

    Args:
        section: the section that names the file of the function.
        place: the row that the prompt comes from, for messages.
        prompt: the prompt as rendered text; with None the function is imported and not called.
        label_json: the prompt's label as JSON text.

    Returns:
        The facts that the check found, for a person.

    Raises:
        ConfigError: the function cannot be used.
    """
    assert section.function is not None
    return check_function(section.function, section, None if prompt is None else TrialCall(place, prompt, label_json))
