"""The record of a run that has ended: its accounting, its report, and the main facts of both on the terminal."""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

from rollmesh.replay.accounting import EndState
from rollmesh.replay.embedded import EmbeddedRedis
from services.config import MeshConfig
from services.launcher.outcome import (
    Books,
    Outcome,
    complete_accounting,
    drop_incomplete,
    equation,
    last_checkpoint,
    record,
)
from services.launcher.report import write_report
from services.launcher.restarts import Restart

HURRY_S = 2.0
"""Time for the accounting after a second signal."""


async def close_books(
    config: MeshConfig,
    folder: Path,
    server: EmbeddedRedis | None,
    outcome: Outcome,
    restarts: Sequence[Restart],
    hurried: asyncio.Event,
) -> None:
    """Write the accounting and the report of a run whose services have ended, and print their main facts.

    Args:
        config: the resolved configuration.
        folder: the run folder.
        server: the run's own Redis; None where the configuration names a Redis.
        outcome: how the run ended.
        restarts: the new starts of its processes.
        hurried: set by a second signal; the accounting then gets `HURRY_S` more.
    """
    drop_incomplete(folder)
    reading = complete_accounting(folder, config.run.name, config.replay.require_url(), server)
    books = await _until_hurried(reading, hurried)
    if shortfall := books.get("shortfall"):
        _say(f"warning: {shortfall}")
    _say(f"{outcome.state.value}: {equation(books)}")
    checkpoint = last_checkpoint(folder)
    if outcome.state is not EndState.COMPLETED:
        kept = f"the last complete checkpoint is {checkpoint}" if checkpoint else "no checkpoint was written"
        _say(f"{outcome.state.value}: {kept}")
        if checkpoint or not config.learner.checkpoint.is_only_last:
            _say(f"continue with: rollmesh resume {shlex.quote(str(folder))}")
    try:
        record(folder, outcome, books, restarts)
        print(f"report: {write_report(folder)}", flush=True)
    except OSError as error:
        problem = f"the report could not be written to {folder} ({error.strerror})"
        _say(f"warning: {problem}; the logs are in {folder / 'logs'}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


async def _until_hurried(reading: Coroutine[Any, Any, Books], hurried: asyncio.Event) -> Books:
    """Return the accounting; where a second signal leaves no time for it, return the reason why it is missing."""
    work = asyncio.create_task(reading, name="accounting")
    hurry = asyncio.create_task(hurried.wait(), name="second signal")
    await asyncio.wait({work, hurry}, return_when=asyncio.FIRST_COMPLETED)
    await asyncio.wait({work}, timeout=HURRY_S)
    hurry.cancel()
    if work.done():
        return work.result()
    work.cancel()
    return {"missing": "a second signal ended the run at once"}
