"""The presets: the settings in which each algorithm differs from the defaults of `rollmesh.algorithms.config`.

The mesh file may override every setting of a preset. The import of this module needs no torch.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "ppo": {
        "advantage": {"estimator": "gae", "gae_lambda": 0.95},
        "loss": {"clip_low": 0.2, "clip_high": 0.2},
        "kl": {"estimator": "k1", "place": "reward"},
    },
    "reinforce++": {
        "advantage": {"estimator": "reinforce"},
        "loss": {"clip_low": 0.2, "clip_high": 0.2},
        "kl": {"estimator": "k1", "place": "reward"},
    },
    "reinforce++-baseline": {
        "advantage": {"estimator": "reinforce_baseline"},
        "loss": {"clip_low": 0.2, "clip_high": 0.2},
        "kl": {"estimator": "k2", "place": "loss"},
    },
    "grpo": {"advantage": {"estimator": "group_norm"}},
    "dr_grpo": {
        "advantage": {"estimator": "dr_grpo"},
        "loss": {"clip_low": 0.2, "clip_high": 0.2, "aggregation": "constant"},
    },
    "rloo": {
        "advantage": {"estimator": "rloo"},
        "loss": {"clip_low": 0.2, "clip_high": 0.2},
        "kl": {"estimator": "k1", "place": "reward"},
    },
    "dapo": {
        "advantage": {"estimator": "group_norm"},
        "filter": {"score_range": [0.0, 1.0]},
    },
    "gspo": {
        "advantage": {"estimator": "group_norm"},
        "loss": {"type": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sequence_mean"},
    },
    "cispo": {
        "advantage": {"estimator": "group_norm"},
        "loss": {"type": "cispo", "clip_low": None, "clip_high": 4.0},
    },
}

PAPERS: dict[str, str] = {
    "ppo": "https://arxiv.org/abs/1707.06347",
    "reinforce++": "https://arxiv.org/abs/2501.03262",
    "reinforce++-baseline": "https://arxiv.org/abs/2501.03262",
    "grpo": "https://arxiv.org/abs/2402.03300",
    "dr_grpo": "https://arxiv.org/abs/2503.20783",
    "rloo": "https://arxiv.org/abs/2402.14740",
    "dapo": "https://arxiv.org/abs/2503.14476",
    "gspo": "https://arxiv.org/abs/2507.18071",
    "cispo": "https://arxiv.org/abs/2506.13585",
}
