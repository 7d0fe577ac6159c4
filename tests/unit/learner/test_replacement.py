"""The replacement of a folder: a process that is killed at any moment leaves the old or the new folder whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from services.learner import replacement
from services.learner.replacement import publish_folder, restore_replaced

CALLS = ("rename", "rmtree", "fsync", "exchange")


class Killed(BaseException):
    """The process was killed before a call."""


def _folder(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "manifest.json").write_text(content)
    return path


def _kill_before_call(monkeypatch: pytest.MonkeyPatch, number: int, can_exchange: bool) -> None:
    """Raise `Killed` before the call with this ``number``, from 0, among the calls that change the file system."""
    left = [number]

    def guarded(call):  # type: ignore[no-untyped-def]
        def before(*args, **options):  # type: ignore[no-untyped-def]
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return call(*args, **options)

        return before

    monkeypatch.setattr(Path, "rename", guarded(Path.rename))
    monkeypatch.setattr(os, "fsync", guarded(os.fsync))
    monkeypatch.setattr(replacement.shutil, "rmtree", guarded(replacement.shutil.rmtree))
    exchange = replacement.exchange if can_exchange else lambda first, second: False
    monkeypatch.setattr(replacement, "exchange", guarded(exchange))


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_process_killed_anywhere_leaves_the_old_folder_or_the_new_one(tmp_path: Path, can_exchange: bool) -> None:
    contents, number, is_through = [], 0, False
    while not is_through:
        parent = tmp_path / str(number)
        parent.mkdir()
        final, partial = _folder(parent / "export", "old"), _folder(parent / "export.partial", "new")
        with pytest.MonkeyPatch.context() as monkeypatch:
            _kill_before_call(monkeypatch, number, can_exchange)
            try:
                publish_folder(partial, final)
                is_through = True
            except Killed:
                pass
        if can_exchange:
            assert final.exists()
        restore_replaced(parent)
        contents.append((final / "manifest.json").read_text())
        assert not list(parent.glob("*.replaced"))
        number += 1
    assert contents == sorted(contents, reverse=True)
    assert contents[0] == "old"
    assert contents[-1] == "new"
    assert [path.name for path in parent.iterdir()] == ["export"]


def test_a_first_folder_gets_its_name(tmp_path: Path) -> None:
    publish_folder(_folder(tmp_path / "export.partial", "new"), tmp_path / "export")
    assert (tmp_path / "export" / "manifest.json").read_text() == "new"


def test_a_folder_that_stepped_aside_does_not_take_the_place_of_a_newer_one(tmp_path: Path) -> None:
    _folder(tmp_path / "export", "new")
    _folder(tmp_path / "export.replaced", "old")
    restore_replaced(tmp_path)
    assert [(path.name, (path / "manifest.json").read_text()) for path in tmp_path.iterdir()] == [("export", "new")]
