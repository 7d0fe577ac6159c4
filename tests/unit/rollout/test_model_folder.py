"""What a model folder says about itself, before anything heavy is imported."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from rollmesh.errors import ConfigError, InvalidArgumentError
from rollmesh.types import TensorSpec
from rollmesh.weights.plan import build_plan
from services.rollout.model_folder import ModelFolder

TENSORS = {"model.embed_tokens.weight": (8, 4), "model.norm.weight": (4,), "lm_head.weight": (8, 4)}


def write_folder(folder: Path, tensors: dict[str, tuple[int, ...]] | None = None, **config: object) -> Path:
    (folder / "config.json").write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"], **config}))
    if tensors is not None:
        header = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in tensors.items()}
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    return folder


def plan_of(tensors: dict[str, tuple[int, ...]]):
    return build_plan([TensorSpec(name, "float32", shape) for name, shape in tensors.items()], 1000)


@pytest.mark.parametrize(
    ("prepare", "problem"),
    [
        (lambda folder: folder / "absent", "is not a folder"),
        (lambda folder: folder, "config.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("{") and folder, "is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]") and folder, "holds no mapping"),
        (lambda folder: (folder / "config.json").write_text("{}") and folder, "names no architecture"),
        (lambda folder: write_folder(folder, architectures=["BertForMaskedLM"]), "is a BertForMaskedLM"),
    ],
)
def test_a_folder_without_a_causal_model_is_refused_saying_why(tmp_path: Path, prepare, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        ModelFolder.read(prepare(tmp_path))
    assert caught.value.place == "model.path"


@pytest.mark.parametrize("payload", [b"", b"\xff" * 16, struct.pack("<Q", 3) + b"nil", struct.pack("<Q", 2) + b"[]"])
def test_damaged_weights_are_refused(tmp_path: Path, payload: bytes) -> None:
    write_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(payload)
    with pytest.raises(ConfigError, match="is damaged"):
        ModelFolder.read(tmp_path)


def test_the_plan_of_the_model_is_accepted(tmp_path: Path) -> None:
    ModelFolder.read(write_folder(tmp_path, TENSORS)).check_plan(plan_of(TENSORS))


def test_a_tied_head_may_be_in_the_plan_or_in_the_folder_or_in_neither(tmp_path: Path) -> None:
    body = {name: shape for name, shape in TENSORS.items() if name != "lm_head.weight"}
    for stored in (TENSORS, body):
        folder = ModelFolder.read(write_folder(tmp_path, stored, tie_word_embeddings=True))
        folder.check_plan(plan_of(TENSORS))
        folder.check_plan(plan_of(body))


def test_an_untied_head_must_be_in_the_plan(tmp_path: Path) -> None:
    folder = ModelFolder.read(write_folder(tmp_path, TENSORS, tie_word_embeddings=False))
    with pytest.raises(InvalidArgumentError, match=r"lacks 1 tensors .*'lm_head\.weight'"):
        folder.check_plan(plan_of({name: shape for name, shape in TENSORS.items() if name != "lm_head.weight"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"model.norm.weight": (5,)}, r"has shape \(5,\) in the plan"), ({"model.extra": (1,)}, "has no tensor")],
)
def test_a_plan_of_another_model_is_refused(tmp_path: Path, change: dict[str, tuple[int, ...]], message: str) -> None:
    folder = ModelFolder.read(write_folder(tmp_path, TENSORS))
    with pytest.raises(InvalidArgumentError, match=message):
        folder.check_plan(plan_of({**TENSORS, **change}))


def test_a_folder_without_safetensors_leaves_the_check_to_the_engine(tmp_path: Path) -> None:
    ModelFolder.read(write_folder(tmp_path)).check_plan(plan_of({"anything": (1,)}))
