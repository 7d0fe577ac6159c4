"""Checks the engine's settings without importing vLLM, which would take many seconds."""

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
"""Arguments that `rollout.engine.extra` must not set, because the mesh's promises depend on them."""


MIN_OPEN_FILES = 256
"""The number of files that a process of vLLM must be able to open. An idle engine of one process holds 74 files (vLLM
0.32 on CPU). With a limit of 64 files the engine does not start, and its error blames the address 127.0.0.1."""
_MAX_OPEN_FILES = 65_536


def check_engine(engine: EngineSection, model: ModelSection) -> None:
    """Check everything that can be checked before vLLM starts.

    Args:
        engine: vLLM's settings.
        model: the section that names the policy's folder.

    Raises:
        ConfigError: an engine with these settings could not start, or could not generate.
    """
    check_extra(engine.extra)
    num_open_files()
    check_head_size(ModelFolder.read("model.path", model.path))


def num_open_files() -> int:
    """Return the number of files that a process may open here, 65,536 at most: vLLM has no use for more.

    Raises:
        ConfigError: the number is too small for vLLM.
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
        ConfigError: the mesh sets a key itself, or vLLM does not know the key.
    """
    known = _argument_names()
    for name in names:
        refuse_extra(name, known)


def refuse_extra(name: str, known: frozenset[str]) -> None:
    """Raise ConfigError unless the file may set ``name``. An empty ``known`` is ignored."""
    place = f"rollout.engine.extra.{name}"
    if name in OWNED:
        raise ConfigError(place, "is set by the mesh itself", "remove it")
    if known and name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        fix = f"did you mean {close[0]!r}?" if close else "correct or remove it"
        raise ConfigError(place, "is not an argument of vLLM's AsyncEngineArgs", fix)


def _argument_names() -> frozenset[str]:
    """Return the fields of vLLM's AsyncEngineArgs, read from vLLM's source.

    The result is empty where vLLM is not installed, or where the source has another form.
    """
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
