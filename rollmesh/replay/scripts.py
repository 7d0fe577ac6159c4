"""The Lua sources: one file per transition, each run behind a common prelude."""

from __future__ import annotations

from functools import cache
from importlib import resources

NUM_ENDED_KEPT = 1000
"""So many of the groups that ended last keep their rows; of those before, the ledger keeps totals."""


@cache
def source(name: str) -> str:
    """The full text of the script ``name`` (``"commit"``, ``"take"``, ...)."""
    folder = resources.files(__package__) / "scripts"
    parts = [(folder / f"{part}.lua").read_text(encoding="utf-8") for part in ("prelude", name)]
    return "\n".join([f"local num_ended_kept = {NUM_ENDED_KEPT}", *parts])
