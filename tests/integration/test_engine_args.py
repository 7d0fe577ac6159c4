"""The arguments and the environment of vLLM. The tests need vLLM's code, but no running engine."""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path

import pytest

from rollmesh.errors import ConfigError
from services.config import MeshConfig
from services.rollout.compose import engine_settings
from services.rollout.engine import Engine
from services.rollout.engine_args import engine_args, prepare_environment
from tests.integration.test_weight_exactness import mesh_config
from tests.integration.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_model(folder)
    return folder


def with_engine(config: MeshConfig, **changes: object) -> MeshConfig:
    engine = config.rollout.engine.model_copy(update=changes)
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"engine": engine})})


def test_the_settings_of_the_mesh_file_reach_vllm(folder: Path) -> None:
    config = with_engine(mesh_config(folder), enable_prefix_caching=False, extra={"block_size": 64})
    prepare_environment(config.rollout.start_timeout_s, config.weights.host)
    arguments = engine_args(engine_settings(config, worker_index=2))
    assert arguments.model == str(folder)
    assert arguments.max_model_len == config.model.max_length
    assert arguments.logprobs_mode == "processed_logprobs"
    assert arguments.block_size == 64
    assert arguments.enable_prefix_caching is False
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
    assert os.environ["VLLM_WORKER_MULTIPROCESSING_METHOD"] == "spawn"


@pytest.mark.parametrize(("folder_name", "is_used"), [("short", True), ("x" * 120, False)])
def test_sockets_lie_where_their_paths_are_short_enough(
    folder_name: str, is_used: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        temporary = Path(short) / folder_name
        monkeypatch.setattr(tempfile, "tempdir", str(temporary))
        monkeypatch.setenv("VLLM_RPC_BASE_PATH", "to be restored")
        monkeypatch.delenv("VLLM_RPC_BASE_PATH")
        prepare_environment(60.0, "127.0.0.1")
        assert os.environ["VLLM_RPC_BASE_PATH"] == (str(temporary) if is_used else "/tmp")


def test_workers_draw_different_random_numbers(folder: Path) -> None:
    config = mesh_config(folder)
    assert len({engine_args(engine_settings(config, index)).seed for index in range(4)}) == 4


@pytest.mark.parametrize(
    ("extra", "problem"),
    [({"max_model_len": 5}, "is set by the mesh itself"), ({"blocksize": 64}, "is not an argument of vLLM")],
)
def test_extra_arguments_that_cannot_work_are_refused_by_name(folder: Path, extra: dict, problem: str) -> None:
    (name,) = extra
    with pytest.raises(ConfigError, match=problem) as caught:
        engine_args(engine_settings(with_engine(mesh_config(folder), extra=extra)))
    assert caught.value.place == f"rollout.engine.extra.{name}"


def test_what_vllm_itself_refuses_is_a_configuration_error(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.engine: vLLM refuses it"):
        asyncio.run(Engine.start(engine_settings(with_engine(mesh_config(folder), extra={"kv_cache_dtype": "float3"}))))


def test_a_folder_without_a_model_is_refused_before_vllm_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("vLLM was started")

    monkeypatch.setattr("services.rollout.engine.start_vllm", never)
    with pytest.raises(ConfigError, match=r"model\.path"):
        asyncio.run(Engine.start(engine_settings(mesh_config(tmp_path / "absent"))))
