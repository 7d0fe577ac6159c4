"""What services check of a mesh file themselves, composed for the launcher as `services.config` composes sections.

Nothing here imports torch, transformers, vLLM or DeepSpeed.
"""

from __future__ import annotations

from services.reward.config import RewardSection as RewardSection
from services.reward.preflight import TrialCall, check_function
from services.rollout.preflight import check_engine as check_engine


def check_reward_function(
    section: RewardSection, place: str = "", prompt: str | None = None, label_json: str = ""
) -> str:
    """Import the user's reward function in a process of its own, and call it once. Needs the main thread.

    Args:
        section: names the file.
        place: the row that the prompt comes from, for messages.
        prompt: as rendered; None does not call the function.
        label_json: the prompt's label.

    Returns:
        What is known of the function now.

    Raises:
        ConfigError: the function cannot be used.
    """
    assert section.function is not None
    return check_function(section.function, section, None if prompt is None else TrialCall(place, prompt, label_json))
