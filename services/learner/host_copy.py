"""Copies of training state in main memory. Training goes on, and the copies stay as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

StateT = TypeVar("StateT")


@dataclass(frozen=True, slots=True)
class PendingFile:
    """A file whose content is in main memory and is not written yet.

    Attributes:
        path: the path of the file. Its folder exists.
        write: writes the content to a path. Any thread may call it.
    """

    path: Path
    write: Callable[[Path], None]


def copy_to_host(state: StateT) -> StateT:
    """Return a deep copy of a state, with a copy in main memory in place of each tensor.

    Two views of the same memory, such as tied weights, become one copy. A copy is as large as its view: of a view of 10
    elements in a buffer of 1,000 elements, 10 elements are copied.

    Args:
        state: nested dicts, lists and tuples with tensors; any other object is copied by `copy.deepcopy`.
    """
    memo: dict[int, object] = {}
    copies: dict[tuple[object, ...], Tensor] = {}
    devices = set()
    for tensor in _tensors(state):
        view = tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if view not in copies or tensor.numel() == 0:
            copies[view] = _copy(tensor)
        memo[id(tensor)] = copies[view]
        devices.add(tensor.device)
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return copy.deepcopy(state, memo)


def _copy(tensor: Tensor) -> Tensor:
    """Return a copy in main memory. A copy from a GPU is complete once the GPU is synchronised."""
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
    return host.copy_(tensor.detach(), non_blocking=True)


def _tensors(state: object) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors(value)


def write_state(state: object, path: Path) -> None:
    """Write a state with `torch.save`.

    Raises:
        OSError: the file cannot be written. torch itself may raise a RuntimeError about the layout of its archive
            instead, which hides the reason.
    """
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            if error.__context__ is not None:
                raise error.__context__ from error
            raise
