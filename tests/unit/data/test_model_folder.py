"""What a model folder says about itself, in every layout that `from_pretrained` reads; nothing heavy is imported."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from rollmesh.data.model_folder import ModelFolder
from rollmesh.errors import ConfigError

TENSORS = {"model.embed_tokens.weight": (8, 4), "model.norm.weight": (4,)}
CONSOLIDATED = {"tok_embeddings.weight": (8, 4), "norm.weight": (4,)}


def write_config(folder: Path, **settings: object) -> Path:
    (folder / "config.json").write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"], **settings}))
    return folder


def write_weights(file: Path, tensors: dict[str, tuple[int, ...]] = TENSORS) -> None:
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors.items():
        end = offset + 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))


def write_shards(folder: Path) -> None:
    weight_map = {}
    for number, (name, shape) in enumerate(TENSORS.items(), start=1):
        weight_map[name] = f"model-0000{number}-of-00002.safetensors"
        write_weights(folder / weight_map[name], {name: shape})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_named(folder: Path) -> None:
    write_config(folder, transformers_weights="policy.safetensors")
    write_weights(folder / "policy.safetensors")


def write_single_beside(folder: Path) -> None:
    write_weights(folder / "model.safetensors")
    write_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    write_weights(folder / "consolidated.safetensors", CONSOLIDATED)


def write_shards_beside(folder: Path) -> None:
    write_shards(folder)
    write_weights(folder / "consolidated.safetensors", CONSOLIDATED)
    (folder / "params.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")


def fault(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        _ = ModelFolder.read("model.path", folder).shapes
    assert caught.value.place == "model.path"
    return str(caught.value)


@pytest.mark.parametrize(
    ("write", "hidden"),
    [
        (lambda folder: write_weights(folder / "model.safetensors"), set()),
        (write_shards, set()),
        (write_named, set()),
        (
            write_single_beside,
            {"model.safetensors.index.json", "model-00001-of-00002.safetensors", "consolidated.safetensors"},
        ),
        (write_shards_beside, {"consolidated.safetensors", "params.json"}),
    ],
    ids=["single", "shards", "named", "single-beside-others", "shards-beside-others"],
)
def test_weights_are_read_from_the_files_that_from_pretrained_reads(tmp_path: Path, write, hidden: set[str]) -> None:
    write(write_config(tmp_path))
    folder = ModelFolder.read("model.path", tmp_path)
    assert folder.shapes == TENSORS
    assert {file.name for file in folder.second_copies} == hidden


def test_names_are_the_files_own(tmp_path: Path) -> None:
    published = {"wte.weight": (8, 4), "h.0.attn.bias": (1, 1), "rotary_emb.inv_freq": (2,)}
    write_weights(write_config(tmp_path) / "model.safetensors", published)
    assert ModelFolder.read("model.path", tmp_path).shapes == published


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_pickled_weights_are_refused_with_the_command_that_converts_them(tmp_path: Path, name: str) -> None:
    (write_config(tmp_path) / name).write_bytes(b"pickle")
    assert f"{name} holds the weights as a Python pickle, which is not read; write them as safetensors: python -c" in (
        fault(tmp_path)
    )


@pytest.mark.parametrize("payload", [b"\xff" * 16, struct.pack("<Q", 3) + b"nil", struct.pack("<Q", 2) + b"[]"])
def test_damaged_weights_are_refused(tmp_path: Path, payload: bytes) -> None:
    (write_config(tmp_path) / "model.safetensors").write_bytes(payload)
    assert "model.safetensors is damaged" in fault(tmp_path)


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    write_shards(write_config(tmp_path))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "lacks 1 of 2 weight files (first: model-00002-of-00002.safetensors)" in fault(tmp_path)


def test_weights_of_another_name_are_told(tmp_path: Path) -> None:
    write_weights(write_config(tmp_path) / "weights.safetensors")
    assert "has no weights (model.safetensors); from_pretrained does not read weights.safetensors" in fault(tmp_path)


@pytest.mark.parametrize(
    ("settings", "file", "problem"),
    [
        ({"architectures": ["BertForMaskedLM"]}, None, "holds a BertForMaskedLM"),
        ({"architectures": None}, None, "names no architecture"),
        (
            {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
            None,
            "holds a T5ForConditionalGeneration",
        ),
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4}},
            None,
            "holds quantised weights (config.json: quantization_config.quant_method 'awq'), which cannot be trained; "
            "name the folder of the model before it was quantised",
        ),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, None, "quant_method 'fp8'"),
        ({"compression_config": {"format": "int"}}, None, "config.json: compression_config"),
        ({}, "quantize_config.json", "holds quantised weights (quantize_config.json)"),
        ({}, "hf_quant_config.json", "holds quantised weights (hf_quant_config.json)"),
        ({}, "adapter_config.json", "holds an adapter beside the weights"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused(
    tmp_path: Path, settings: dict[str, object], file: str | None, problem: str
) -> None:
    write_config(tmp_path, **settings)
    if file:
        (tmp_path / file).write_text("{}")
    with pytest.raises(ConfigError) as caught:
        ModelFolder.read("model.path", tmp_path).check_trainable()
    assert problem in str(caught.value)
