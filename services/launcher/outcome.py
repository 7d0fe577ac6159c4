"""How a run ended, and the record of it in `accounting.json`.

::

    Outcome + accounting (the coordinator's, else read from Redis here) ─► accounting.json ─► report.md, terminal
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollmesh.errors import RollMeshError
from rollmesh.replay.accounting import EndState, account, write_accounting
from rollmesh.replay.connection import connect
from rollmesh.replay.embedded import EmbeddedRedis
from rollmesh.replay.ledger import Ledger
from services.launcher.run_folder import read_resumes

ACCOUNTING = "accounting.json"
ACCOUNTING_TIMEOUT_S = 30.0
_STATES_OF_OPEN_GROUPS = ("pending", "leased", "ready", "batched")

Books = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended, and why.

    Attributes:
        state: of the run.
        exit_code: of `rollmesh up`; 0 only if the run completed.
        reason: one sentence; empty if the run completed.
        culprit: the process that failed first, e.g. "rollout-0" or "redis"; empty where no process did.
        log: that process's log file.
    """

    state: EndState
    exit_code: int
    reason: str = ""
    culprit: str = ""
    log: Path | None = None

    def as_record(self, folder: Path) -> Books:
        """The keys that describe the end in `accounting.json`; paths are relative to the run's ``folder``."""
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
    """The newest complete checkpoint of a run; None where there is none."""
    complete = [path.parent for path in folder.glob("checkpoints/step-*/manifest.json")]
    return max((path for path in complete if re.fullmatch(r"step-\d+", path.name)), default=None)


def drop_incomplete(folder: Path) -> None:
    """Remove the checkpoints and exports that were being written when the run ended: nobody can load them."""
    for path in (*folder.glob("checkpoints/*.partial"), *folder.glob("export*.partial")):
        shutil.rmtree(path, ignore_errors=True)


def read_json(path: Path) -> Books:
    """The object in a file; empty where there is no such file, or where its writer did not get to its end."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def equation(books: Books) -> str:
    """The accounting in one sentence; where there is none, the reason for that."""
    if "num_groups" not in books:
        return f"there is no accounting: {books.get('missing') or 'nobody wrote it'}"
    counts = books["num_groups"]
    still_open = sum(counts[state] for state in _STATES_OF_OPEN_GROUPS)
    return (
        f"{books['num_opened']} groups opened = {counts['trained'] + counts['retired']} trained + "
        f"{counts['filtered']} filtered + {counts['failed']} failed + {still_open} still open"
    )


async def complete_accounting(folder: Path, run_id: str, url: str, server: EmbeddedRedis | None) -> Books:
    """The accounting that the coordinator wrote; where it could not, the accounting that Redis gives now.

    Args:
        folder: of the run.
        run_id: names the run's keys in Redis.
        url: of Redis.
        server: the run's own Redis. One that has died is started again on its files, for as long as they are read.

    Returns:
        The accounting; or ``missing``, a sentence that says why there is none.
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


def record(folder: Path, outcome: Outcome, books: Books) -> Books:
    """Write `accounting.json`: the accounting, and how the run ended.

    Raises:
        OSError: it cannot be written.
    """
    end = outcome.as_record(folder)
    end["resumes"] = read_resumes(folder)
    whole = {**end, **books, **end}  # the launcher's word on the end, before the coordinator's
    write_accounting(folder / ACCOUNTING, whole)
    return whole
