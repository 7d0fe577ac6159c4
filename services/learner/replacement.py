"""A folder takes the place of another without a moment in which neither has the name.

::

    NAME.partial written, synced ─► exchanged with NAME in one call (renameat2) ─► the old one removed

A process that is killed at any point leaves NAME whole, the old one or the new one. Where the file system cannot
exchange, the old folder steps aside as NAME.replaced for the moment between two renames, and `restore_replaced` gives
it the name back if the process was killed in that moment.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from pathlib import Path

REPLACED = ".replaced"
_AT_CURRENT_FOLDER = -100
_RENAME_EXCHANGE = 2
_CANNOT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


def publish_folder(partial: Path, final: Path) -> None:
    """Sync a folder to disk and give it its name, in place of an older folder."""
    sync_tree(partial)
    if not final.exists():
        partial.rename(final)
    elif exchange(partial, final):
        _sync(final.parent)
        shutil.rmtree(partial)
    else:
        aside = final.with_name(final.name + REPLACED)
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
        partial.rename(final)
        _sync(final.parent)
        shutil.rmtree(aside)
    _sync(final.parent)


def restore_replaced(parent: Path) -> None:
    """Give folders that had stepped aside their names back, where no newer one has them; remove the others."""
    for aside in sorted(parent.glob("*" + REPLACED)):
        final = aside.with_name(aside.name.removesuffix(REPLACED))
        if final.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(final)


def exchange(first: Path, second: Path) -> bool:
    """Let two existing paths change names in one step. False where the system or the file system cannot.

    Raises:
        OSError: they cannot be renamed.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    if rename(_AT_CURRENT_FOLDER, names[0], _AT_CURRENT_FOLDER, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


def sync_tree(folder: Path) -> None:
    """Bring a folder and all files in it to disk."""
    for path, _, files in os.walk(folder):
        for file in files:
            _sync(Path(path, file))
        _sync(Path(path))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
