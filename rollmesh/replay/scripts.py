"""The Lua sources: one file per transition, each run behind a common prelude."""

from __future__ import annotations

from functools import cache
from importlib import resources

NUM_ENDED_KEPT = 1000
"""The number of ended groups that keep their rows: those that ended last. All earlier ended groups become totals."""


@cache
def source(name: str) -> str:
    """Return the full text of the script ``name`` (``"commit"``, ``"take"``, ...).

    A name after ``"fence/"`` (``"fence/lease"``) means the script behind the fence: the script then refuses all
    coordinators but the latest.
    """
    folder = resources.files(__package__) / "scripts"
    texts = [(folder / f"{file}.lua").read_text(encoding="utf-8") for file in ("prelude", *name.split("/"))]
    return "\n".join([f"local num_ended_kept = {NUM_ENDED_KEPT}", *texts])
