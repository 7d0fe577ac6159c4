"""A policy whose training state is one tensor, on a disk that may be slow or full."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from services.learner.checkpoint import Learnables
from services.learner.engine import PolicyEngine
from services.learner.host_copy import PendingFile, copy_to_host, write_state


class FakePolicy:
    """A policy that is not trained by anybody: tests change its weights themselves.

    Attributes:
        weights: the training state, float32 [4].
        may_write: the disk is slow while this event is not set.
        before_write: called before each file is written; may raise what a disk raises.
    """

    def __init__(self) -> None:
        self.weights = torch.zeros(4)
        self.may_write = threading.Event()
        self.may_write.set()
        self.before_write: Callable[[], None] = lambda: None

    @property
    def learnables(self) -> Learnables:
        return Learnables(cast(PolicyEngine, self))

    def copy_state(self, folder: Path, tag: str) -> list[PendingFile]:
        state = copy_to_host({"weights": self.weights})
        (folder / tag).mkdir(parents=True)
        return [PendingFile(folder / tag / f"part-{part}.pt", lambda path: self._write(state, path)) for part in (0, 1)]

    def load(self, folder: Path, tag: str) -> None:
        first, second = (torch.load(folder / tag / f"part-{part}.pt")["weights"] for part in (0, 1))
        assert torch.equal(first, second)
        self.weights.copy_(first)

    def copy_weights(self) -> dict[str, Tensor]:
        return copy_to_host({"weights": self.weights})

    def write_pretrained(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._write(dict(state), folder / "model.pt")

    def _write(self, state: Mapping[str, Tensor], path: Path) -> None:
        assert self.may_write.wait(60)
        self.before_write()
        write_state(state, path)
