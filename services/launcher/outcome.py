"""How a run ended, and the record of it in `accounting.json`.

::

    Outcome + accounting (from the coordinator, else read from Redis) ─► accounting.json ─► report.md, terminal
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollmesh.errors import RollMeshError
from rollmesh.replay.accounting import EndState, account, write_accounting
from rollmesh.replay.connection import connect
from rollmesh.replay.embedded import EmbeddedRedis
from rollmesh.replay.ledger import Ledger
from services.launcher.restarts import Restart
from services.launcher.run_folder import complete_checkpoints, read_resumes

ACCOUNTING = "accounting.json"
ACCOUNTING_TIMEOUT_S = 30.0
_STATES_OF_OPEN_GROUPS = ("pending", "leased", "ready", "batched")

Books = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended, and why.

    Attributes:
        state: the way in which the run ended: completed, failed or interrupted.
        exit_code: the exit code of `rollmesh up`; 0 only if the run completed.
        reason: the reason for the end in one sentence; empty if the run completed.
        culprit: the process that failed first, e.g. "rollout-0" or "redis"; empty where no process failed.
        log: the log file of that process; None where no process failed, or the process has no log of its own.
    """

    state: EndState
    exit_code: int
    reason: str = ""
    culprit: str = ""
    log: Path | None = None

    def as_record(self, folder: Path) -> Books:
        """Return the keys of `accounting.json` that describe the end. Paths are relative to the run's ``folder``."""
        checkpoint = last_checkpoint(folder)
        cause = {"process": self.culprit, "log": _relative(self.log, folder)} if self.culprit else None
        return {
            "state": self.state.value,
            "reason": self.reason,
            "first_cause": cause,
            "checkpoint": _relative(checkpoint, folder),
        }


def _relative(path: Path | None, folder: Path) -> str | None:
    if path is None:
        return None
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def last_checkpoint(folder: Path) -> Path | None:
    """Return the folder of the newest complete checkpoint of a run; None where no checkpoint is complete."""
    return next(reversed(complete_checkpoints(folder).values()), None)


def drop_incomplete(folder: Path) -> None:
    """Remove the checkpoints and exports that were being written when the run ended: they cannot be loaded."""
    for path in (*folder.glob("checkpoints/*.partial"), *folder.glob("export*.partial")):
        shutil.rmtree(path, ignore_errors=True)


def read_json(path: Path) -> Books:
    """Return the JSON object in a file; empty where the file is missing or was not written to its end."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def equation(books: Books) -> str:
    """Return the accounting as one sentence; where the accounting is missing, return the reason for that."""
    if "num_groups" not in books:
        return f"there is no accounting: {books.get('missing') or 'nobody wrote it'}"
    counts = books["num_groups"]
    still_open = sum(counts[state] for state in _STATES_OF_OPEN_GROUPS)
    return (
        f"{books['num_opened']} groups opened = {counts['trained'] + counts['retired']} trained + "
        f"{counts['filtered']} filtered + {counts['failed']} failed + {still_open} still open"
    )


async def complete_accounting(folder: Path, run_id: str, url: str, server: EmbeddedRedis | None) -> Books:
    """Return the accounting that the coordinator wrote; where it wrote none, the accounting that Redis gives now.

    A Redis of the run that has died is started again on its files, until the accounting is read.

    Args:
        folder: the run folder.
        run_id: the run's name in the keys of Redis.
        url: the URL of Redis.
        server: the run's own Redis; None where the configuration names a Redis.

    Returns:
        The accounting; or the key ``missing`` with a sentence that says why the accounting is missing.
    """
    written = read_json(folder / ACCOUNTING)
    if "num_groups" in written:
        return written
    try:
        async with asyncio.timeout(ACCOUNTING_TIMEOUT_S):
            if server is None or server.is_running:
                return await _read_ledger(url, run_id)
            with await asyncio.to_thread(EmbeddedRedis.start, folder / "redis", ACCOUNTING_TIMEOUT_S / 2) as again:
                return await _read_ledger(again.url, run_id)
    except TimeoutError:
        return {"missing": f"Redis did not give the ledger within {ACCOUNTING_TIMEOUT_S:g} s"}
    except RollMeshError as error:
        return {"missing": f"the ledger could not be read from Redis ({error})"}


async def _read_ledger(url: str, run_id: str) -> Books:
    redis = connect(url, ACCOUNTING_TIMEOUT_S / 3)
    try:
        return await account(Ledger(redis, run_id))
    finally:
        await redis.aclose()


def record(folder: Path, outcome: Outcome, books: Books, restarts: Sequence[Restart] = ()) -> Books:
    """Write `accounting.json`, and return the content of the file.

    Args:
        folder: the run folder.
        outcome: how the run ended.
        books: the accounting of its groups.
        restarts: the new starts of its processes, the earliest first.

    Raises:
        OSError: the file cannot be written.
    """
    end = outcome.as_record(folder)
    end["resumes"] = read_resumes(folder)
    end["restarts"] = [restart.as_record() for restart in restarts]
    whole = {**end, **books, **end}  # the end's keys come first, and the launcher's values replace the coordinator's
    write_accounting(folder / ACCOUNTING, whole)
    return whole
