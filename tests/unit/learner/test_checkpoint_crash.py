"""A learner that is killed between any two calls to the file system leaves a whole checkpoint, and the next one tidies.

The tests kill the writing before each call, and in the middle of each write to a file. After that no call has an effect
any more, so that no clean-up of Python runs that a killed process would not run.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from services.learner import replacement
from tests.fakes.learnables import FakePolicy
from tests.unit.learner.test_checkpoint import loaded, save, store_in

CALLS = ("open", "mkdir", "rename", "replace", "fsync", "unlink", "rmdir")
"""The functions of `os` that are counted, besides the opening of files, the writes to files, and `exchange`."""


class Killed(BaseException):
    """The process was killed before a call."""


class Killer:
    """Counts calls to the file system, and kills the process before one of them.

    Args:
        number: the call that is not made any more, from 0.
    """

    def __init__(self, number: int) -> None:
        self._left = number
        self.made: list[str] = []

    def count(self, name: str) -> None:
        if self._left == 0:
            raise Killed(name)
        self._left -= 1
        self.made.append(name)

    def guard(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **options: Any) -> Any:
            self.count(name)
            return call(*args, **options)

        return guarded

    def open(self, path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        self.count("open a file")
        file = _OPEN(path, mode, *args, **options)
        return file if "r" in mode else _File(file, self)


_OPEN = io.open


class _File:
    """A file whose writes are counted. A kill in a write leaves half of the bytes in the file."""

    def __init__(self, file: Any, killer: Killer) -> None:
        self._file, self._killer = file, killer

    def write(self, data: Any) -> int:
        try:
            self._killer.count("write")
        except Killed:
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            raise
        return int(self._file.write(data))

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def killed_before(number: int) -> Iterator[Killer]:
    """Kill the process of the block before its call with this ``number``."""
    killer = Killer(number)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in CALLS:
            monkeypatch.setattr(os, name, killer.guard(name, getattr(os, name)))
        monkeypatch.setattr(io, "open", killer.open)
        monkeypatch.setattr(replacement, "exchange", killer.guard("exchange", replacement.exchange))
        yield killer


def _write(folder: Path, policy: FakePolicy, step: int) -> None:
    store = store_in(folder, max_kept=1)
    save(store, policy, step)
    store.wait()


@pytest.mark.parametrize("step", [2, 1])
def test_a_kill_at_any_call_leaves_a_whole_checkpoint(tmp_path: Path, step: int) -> None:
    """The second checkpoint is of the next step, or of the same step after the learner went back.

    `test_replacement` has the file systems that cannot exchange two names.
    """
    found, number, is_through = [], 0, False
    while not is_through:
        folder = tmp_path / str(number)
        policy = FakePolicy()
        policy.weights.fill_(1)
        _write(folder, policy, 1)
        policy.weights.fill_(2)
        with killed_before(number) as killer:
            try:
                _write(folder, policy, step)
                is_through = True
            except Killed:
                pass
        store = store_in(folder, max_kept=1)
        weights = [loaded(store, each)[0] for each in store.steps()]
        found.append(weights[-1])
        leftovers = [path.name for path in folder.rglob("*") if path.suffix in (".partial", ".replaced")]
        assert not leftovers, (number, killer.made[-1:])
        assert weights in ([1], [2], [1, 2])
        number += 1
    assert found == sorted(found), "once the new checkpoint is complete it stays"
    assert (found[0], found[-1]) == (1, 2)
    assert {"write", "fsync", "exchange" if step == 1 else "rename", "mkdir", "unlink"} <= set(killer.made)
