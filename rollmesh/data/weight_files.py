"""The files of weights in a model folder, and the tensors that their headers list.

The files are chosen as ``from_pretrained`` of transformers chooses them: one file, else the shards of an index. A
folder may hold the weights a second time in another layout, such as Mistral's ``consolidated.safetensors``; files of
that layout are not chosen.

A safetensors file has three parts: the length of its header (little-endian uint64), the header as JSON, and the bytes
of the tensors. This module reads only headers, so that a folder of any size takes a fraction of a second.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from rollmesh.errors import ConfigError

EXPORT_AGAIN = "copy or export the model again"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")

Shape = tuple[int, ...]


def find_weights(place: str, folder: Path, named: str | None = None) -> tuple[Path, ...]:
    """Return the files from which the weights are read.

    Args:
        place: the dotted path of the setting that names the folder, for messages.
        folder: the model folder.
        named: the file or index that config.json names in ``transformers_weights``; None for the usual names.

    Raises:
        ConfigError: there is no file of weights, a file is empty or not safetensors, or a shard of the index is
            missing.
    """
    candidates = (named,) if named else (SINGLE, INDEX)
    first = next((folder / name for name in candidates if (folder / name).is_file()), None)
    if first is None:
        raise _no_weights(place, folder, candidates[0])
    files = _shards(place, folder, first) if first.name.endswith(".index.json") else (first,)
    for file in files:
        if not file.stat().st_size:
            raise ConfigError(place, f"{file} is empty", EXPORT_AGAIN)
        if file.suffix != ".safetensors":
            raise _pickled(place, file)
    return files


def second_copies(folder: Path, weights: tuple[Path, ...]) -> frozenset[Path]:
    """Return the files to hide from an engine, which would read every ``*.safetensors`` of the folder.

    These files are copies of the weights in another layout, an index that does not belong to ``weights``, and the
    configuration of Mistral's own layout.

    Args:
        folder: the model folder.
        weights: the files that the engine should read.
    """
    hidden = {file for file in folder.glob("*.safetensors") if file not in weights}
    hidden |= {file for name in ("params.json", INDEX) if (file := folder / name).is_file()}
    return frozenset(hidden - ({folder / INDEX} if folder / SINGLE not in weights else set()))


def read_shapes(place: str, file: Path) -> dict[str, Shape]:
    """Return the shape of each tensor in a safetensors file.

    Raises:
        ConfigError: the file is damaged, or its length is not the length that its header gives.
    """
    try:
        header, num_bytes = _read_header(file)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        if end != num_bytes:
            raise ValueError(f"it holds {num_bytes} bytes of tensors, but its header lists {end}")
        return {name: tuple(entry["shape"]) for name, entry in tensors.items()}
    except (OSError, ValueError, KeyError, TypeError, IndexError, struct.error) as error:
        raise ConfigError(place, f"{file} is damaged ({error})", EXPORT_AGAIN) from error


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Return the header, and the number of bytes behind it."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        rest = file.stat().st_size - 8 - length
        if rest < 0:
            raise ValueError("its header is longer than the file")
        header = json.loads(stream.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    return header, rest


def _shards(place: str, folder: Path, index: Path) -> tuple[Path, ...]:
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = tuple(folder / shard for shard in shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(place, f"{index} is not an index of weights", EXPORT_AGAIN) from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        problem = f"{folder} lacks {len(missing)} of {len(files)} weight files (first: {missing[0]})"
        raise ConfigError(place, problem, EXPORT_AGAIN)
    return files


def _no_weights(place: str, folder: Path, wanted: str) -> ConfigError:
    pickled = next((folder / name for name in _PICKLED if (folder / name).is_file()), None)
    if pickled is not None:
        return _pickled(place, pickled)
    others = sorted(
        file.name for pattern in ("*.safetensors", "*.bin", "*.pt*", "*.gguf") for file in folder.glob(pattern)
    )
    found = f"; from_pretrained does not read {others[0]}" if others else ""
    return ConfigError(place, f"{folder} has no weights ({wanted}){found}", EXPORT_AGAIN)


def _pickled(place: str, file: Path) -> ConfigError:
    folder = file.parent
    command = f"python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{folder}')"
    fix = f"write them as safetensors: {command}.save_pretrained('{folder}')\""
    return ConfigError(place, f"{file} holds the weights as a Python pickle, which is not read", fix)
