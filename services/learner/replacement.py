"""The replacement of a folder by a newer folder, safe against a kill at any moment.

::

    NAME.partial written, synced ─► exchanged with NAME in one call (renameat2) ─► the old folder removed

If the process is killed at any point, NAME is the whole old folder or the whole new folder. Some file systems cannot
exchange two names. There the old folder has the name NAME.replaced for the moment between two renames. If the process
is killed in that moment, `restore_replaced` gives the old folder its name back.
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
    """Sync the folder ``partial`` to disk, and give it the name ``final``, in place of an older folder."""
    sync_tree(partial)
    if not final.exists():
        partial.rename(final)
    elif exchange(partial, final):
        sync(final.parent)
        shutil.rmtree(partial)
    else:
        aside = final.with_name(final.name + REPLACED)
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
        partial.rename(final)
        sync(final.parent)
        shutil.rmtree(aside)
    sync(final.parent)


def restore_replaced(parent: Path) -> None:
    """Rename each folder NAME.replaced to NAME if NAME is missing; else remove the folder NAME.replaced."""
    for aside in sorted(parent.glob("*" + REPLACED)):
        final = aside.with_name(aside.name.removesuffix(REPLACED))
        if final.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(final)


def exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two existing paths in one step.

    Returns:
        True after the exchange; False where the system or the file system cannot exchange names.

    Raises:
        OSError: the paths cannot be renamed.
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
    """Sync a folder and all files and folders in it to disk."""
    for path, _, files in os.walk(folder):
        for file in files:
            sync(Path(path, file))
        sync(Path(path))


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
