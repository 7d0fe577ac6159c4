"""Check the keys of `learner.deepspeed` without importing DeepSpeed.

The import of DeepSpeed takes many seconds and needs torch.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rollmesh.errors import ConfigError

OWNED = {
    "optimizer": "set learner.optimizer instead",
    "scheduler": "set learner.optimizer.schedule instead",
    "gradient_clipping": "set learner.optimizer.max_grad_norm instead",
    "bf16": "set learner.dtype instead",
    "fp16": "set learner.dtype instead",
    "train_batch_size": "set training.prompts_per_step instead",
    "train_micro_batch_size_per_gpu": "set learner.tokens_per_micro_batch instead",
    "gradient_accumulation_steps": "set learner.tokens_per_micro_batch instead",
    "zero_optimization.stage": "set learner.zero_stage instead",
}
"""Keys of DeepSpeed that the learner sets itself, with the setting of RollMesh that each key follows from."""
_KEY = re.compile(r"[a-z][a-z0-9_]*")


def check_deepspeed(settings: Mapping[str, Any]) -> None:
    """Check the keys of `learner.deepspeed`, of its `zero_optimization`, and of the two offload sections there.

    Raises:
        ConfigError: the mesh sets a key itself, or DeepSpeed does not know a key.
    """
    if not settings:
        return
    known = _known_keys()
    _check_keys("", settings, known)
    zero = settings.get("zero_optimization")
    if isinstance(zero, Mapping):
        _check_keys("zero_optimization.", zero, known)
        for key in ("offload_param", "offload_optimizer"):
            if isinstance(zero.get(key), Mapping):
                _check_keys(f"zero_optimization.{key}.", zero[key], known)


def _check_keys(parent: str, keys: Iterable[str], known: frozenset[str]) -> None:
    """Refuse a key that the mesh sets itself, and a key that is not in ``known``.

    Args:
        parent: the path in front of the keys, with a dot at its end; empty for the keys of `learner.deepspeed`.
        keys: the keys to check.
        known: the keys that DeepSpeed knows. Where ``known`` is empty, every key passes for a known key.
    """
    for key in keys:
        place = f"learner.deepspeed.{parent}{key}"
        if parent + key in OWNED:
            raise ConfigError(place, "is set by the mesh itself", OWNED[parent + key])
        if known and key not in known:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
            fix = f"did you mean {close[0]!r}?" if close else "correct or remove it"
            raise ConfigError(place, "is not a key of DeepSpeed's configuration", fix)


def _known_keys() -> frozenset[str]:
    """Return every word in DeepSpeed's configuration modules that may be a key.

    Each string that looks like a key is a word, and so is each name of a declared field. These are more words than
    DeepSpeed has keys: no key that DeepSpeed reads may be refused. DeepSpeed itself ignores unknown keys in silence.
    The result is empty where DeepSpeed is not installed, or where its files cannot be read.
    """
    spec = importlib.util.find_spec("deepspeed")
    if spec is None or not spec.submodule_search_locations:
        return frozenset()
    folder = Path(next(iter(spec.submodule_search_locations)))
    words: set[str] = set()
    for file in (*folder.rglob("*config*.py"), *folder.rglob("constants.py")):
        try:
            module = ast.parse(file.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, UnicodeDecodeError):
            return frozenset()
        for node in ast.walk(module):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and _KEY.fullmatch(node.value):
                words.add(node.value)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                words.add(node.target.id)
    return frozenset(words)
