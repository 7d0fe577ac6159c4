"""Whether this machine has a CUDA device at all, asked of the driver: torch takes seconds to import."""

from __future__ import annotations

import ctypes
import importlib.metadata
from pathlib import Path

from rollmesh.errors import ConfigError
from services.config import MeshConfig


def check_devices(config: MeshConfig) -> None:
    """Raises ConfigError if a section asks for "cuda" and there can be none."""
    wanted = [("learner.device", config.learner.device)]
    if config.has_reference and config.reference:
        wanted.append(("reference.device", config.reference.device))
    for place, device in wanted:
        check_device(place, device)


def check_device(place: str, device: str) -> None:
    """Raises ConfigError if ``device`` is "cuda" and there can be none."""
    if device == "cuda" and (obstacle := cuda_obstacle()):
        raise ConfigError(place, f"is 'cuda', but {obstacle}", "set it to auto or cpu")


def cuda_obstacle() -> str | None:
    """Why torch will find no device that it calls "cuda"; None where it may find one."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if version.endswith("+cpu"):
        return f"the torch that is installed ({version}) is built for CPU alone"
    if Path("/dev/kfd").exists():  # AMD's driver, which torch calls "cuda" too
        return None
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "this machine has no NVIDIA driver"
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "the NVIDIA driver finds no device here"
    return None
