"""What can be said of the engine's settings without importing vLLM, which takes many seconds."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import resource
from collections.abc import Iterable
from pathlib import Path

from rollmesh.config import ModelSection
from rollmesh.data.model_folder import ModelFolder
from rollmesh.errors import ConfigError
from services.rollout.config import EngineSection
from services.rollout.kernels import check_head_size

OWNED = frozenset(
    {
        "model",
        "max_model_len",
        "logprobs_mode",
        "weight_transfer_config",
        "worker_extension_cls",
        "data_parallel_size",
        "enable_sleep_mode",
        "speculative_config",
    }
)
"""Arguments that `rollout.engine.extra` may not set: the mesh's promises rest on them."""


MIN_OPEN_FILES = 256
"""Files that a process of vLLM has to be able to open. An idle engine of one process holds 74 (vLLM 0.32 on CPU); with
64 allowed it does not start, and blames the address 127.0.0.1."""
_MAX_OPEN_FILES = 65_536


def check_engine(engine: EngineSection, model: ModelSection) -> None:
    """Check everything that can be checked before vLLM starts.

    Args:
        engine: vLLM's settings.
        model: the section that names the policy's folder.

    Raises:
        ConfigError: it could not start, or not generate.
    """
    check_extra(engine.extra)
    num_open_files()
    check_head_size(ModelFolder.read("model.path", model.path))


def num_open_files() -> int:
    """How many files a process may let itself open here, as far as vLLM has use for them.

    Raises:
        ConfigError: these are too few for vLLM.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    if most < MIN_OPEN_FILES:
        problem = f"a process may open {hard} files here, and vLLM needs {MIN_OPEN_FILES}"
        raise ConfigError("rollout", problem, "raise the hard limit (ulimit -Hn), or have the administrator do that")
    return most


def check_extra(names: Iterable[str]) -> None:
    """Check the keys of `rollout.engine.extra`.

    Raises:
        ConfigError: one is the mesh's own, or vLLM does not know it.
    """
    known = _argument_names()
    for name in names:
        refuse_extra(name, known)


def refuse_extra(name: str, known: frozenset[str]) -> None:
    """Raises ConfigError unless ``name`` may be set; an empty ``known`` is not consulted."""
    place = f"rollout.engine.extra.{name}"
    if name in OWNED:
        raise ConfigError(place, "is set by the mesh itself", "remove it")
    if known and name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        fix = f"did you mean {close[0]!r}?" if close else "correct or remove it"
        raise ConfigError(place, "is not an argument of vLLM's AsyncEngineArgs", fix)


def _argument_names() -> frozenset[str]:
    """The fields of vLLM's AsyncEngineArgs, from its source; empty where that is not here or has another form."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return frozenset()
    try:
        module = ast.parse((Path(spec.origin).parent / "engine" / "arg_utils.py").read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return frozenset()
    classes = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}
    if not {"EngineArgs", "AsyncEngineArgs"} <= classes.keys():
        return frozenset()
    statements = [*classes["EngineArgs"].body, *classes["AsyncEngineArgs"].body]
    return frozenset(
        node.target.id for node in statements if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    )
