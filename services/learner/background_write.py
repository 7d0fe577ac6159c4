"""One piece of writing on a thread of its own, beside training."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait

POLL_S = 1.0
"""Time between two checks that the run still goes on, while the step loop waits for the writing."""


class BackgroundWrite:
    """A call that writes files on a thread of its own. The end of the process does not wait for the thread.

    Args:
        write: the call. It may make no collective, because training makes its collectives meanwhile.
    """

    def __init__(self, write: Callable[[], None]) -> None:
        self._outcome: Future[None] = Future()
        # The thread alone holds the call, and with the call the copies, so that their memory is free when it ends.
        threading.Thread(target=self._run, args=(write,), name="checkpoint", daemon=True).start()

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
            self._outcome.set_result(None)
        except BaseException as error:  # noqa: BLE001 - `check` raises it in the step loop
            self._outcome.set_exception(error)

    def wait(self, check: Callable[[], None]) -> None:
        """Wait for the end of the call.

        Args:
            check: called again and again meanwhile; raises an error when the run is over.

        Raises:
            ConfigError: the files could not be written.
        """
        while not wait([self._outcome], POLL_S).done:
            check()
        self._outcome.result()

    def check(self) -> None:
        """Return at once.

        Raises:
            ConfigError: the call has ended, because the files could not be written.
        """
        if self._outcome.done():
            self._outcome.result()
