"""Ask the driver, and not torch, whether this machine has a CUDA device: the import of torch takes seconds."""

from __future__ import annotations

import ctypes
import importlib.metadata
from pathlib import Path

from rollmesh.errors import ConfigError


def check_device(place: str, device: str) -> None:
    """Raise ConfigError if ``device`` is "cuda" and torch cannot find a CUDA device here."""
    if device == "cuda" and (obstacle := cuda_obstacle()):
        raise ConfigError(place, f"is 'cuda', but {obstacle}", "set it to auto or cpu")


def cuda_obstacle() -> str | None:
    """Return the reason why torch will find no CUDA device; None where torch may find a device."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if version.endswith("+cpu"):
        return f"the torch that is installed ({version}) is built for CPU alone"
    if Path("/dev/kfd").exists():  # AMD's driver; torch calls its devices "cuda" too
        return None
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "this machine has no NVIDIA driver"
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "the NVIDIA driver finds no device here"
    return None
