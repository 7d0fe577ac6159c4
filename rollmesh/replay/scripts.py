"""The Lua sources: one file per transition, each run behind a common prelude."""

from __future__ import annotations

from functools import cache
from importlib import resources


@cache
def source(name: str) -> str:
    """The full text of the script ``name`` (``"commit"``, ``"take"``, ...)."""
    folder = resources.files(__package__) / "scripts"
    return "\n".join((folder / f"{part}.lua").read_text(encoding="utf-8") for part in ("prelude", name))
