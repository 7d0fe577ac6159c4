"""Starts, calls and ends vLLM's processes, and turns vLLM's errors into the mesh's errors."""

from __future__ import annotations

import asyncio
import concurrent.futures
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from rollmesh.data.model_folder import ModelFolder
from rollmesh.errors import ConfigError, DeadlineError, RollMeshError, WeightTransferError
from services.rollout.engine_args import EngineSettings, engine_args, prepare_environment
from services.rollout.engine_folder import engine_folder
from services.rollout.engine_log import EngineLog, hint
from services.rollout.preflight import check_engine

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

_T = TypeVar("_T")

_CALL_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 20.0


async def start_vllm(settings: EngineSettings, log: EngineLog) -> AsyncLLM:
    """Start an engine. The start takes many seconds; the event loop goes on meanwhile.

    Raises:
        ConfigError: vLLM is not installed, refuses its settings, or could not start with them.
        DeadlineError: vLLM was not up within `rollout.start_timeout_s`.
        RollMeshError: vLLM did not start; the message gives the cause that ``log`` shows.
        StartAgainError: a signal killed a process of vLLM.
    """
    prepare_environment(settings.rollout.start_timeout_s, settings.weights.host)
    check_engine(settings.rollout.engine, settings.model)
    timeout_s = settings.rollout.start_timeout_s
    is_given_up = threading.Event()
    try:
        async with asyncio.timeout(timeout_s):
            return await _in_thread(lambda: _start(settings, log, is_given_up))
    except asyncio.CancelledError:
        _give_up(is_given_up)
        raise
    except TimeoutError as error:
        _give_up(is_given_up)
        raise DeadlineError(f"vLLM was not up after rollout.start_timeout_s = {timeout_s:g} s") from error


async def stop_vllm(llm: AsyncLLM) -> None:
    """End the engine's processes, within a bounded time."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_STOP_TIMEOUT_S):
            await _in_thread(lambda: llm.shutdown(timeout=_STOP_TIMEOUT_S / 2))
    # vLLM's destructor shuts down again. At the interpreter's exit the destructor would find vLLM's modules gone.
    llm.shutdown = lambda timeout=None: None


async def call_workers(llm: AsyncLLM, method: str, *args: object) -> list[Any]:
    """Call a method of all worker processes between two of their steps. Return their answers in the order of the ranks.

    Raises:
        DeadlineError: the processes did not answer in time.
        WeightTransferError: the call failed, or the engine has died.
    """
    try:
        async with asyncio.timeout(_CALL_TIMEOUT_S):
            with vllm_errors(method):
                answers: list[Any] = await llm.collective_rpc(method, args=args)
                return answers
    except TimeoutError as error:
        raise DeadlineError(f"vLLM did not answer {method} in {_CALL_TIMEOUT_S:g} s") from error


@contextmanager
def vllm_errors(what: str) -> Iterator[None]:
    """Turn every error of vLLM inside the block into a WeightTransferError. ``what`` names the failed action."""
    try:
        yield
    except (RollMeshError, TimeoutError):
        raise
    except Exception as error:  # a failed call arrives as a bare Exception with the text of the original
        raise WeightTransferError(f"vLLM failed at {what}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without the final full stop."""
    return str(error).strip().split("\n", 1)[0].rstrip(".")


def _start(settings: EngineSettings, log: EngineLog, is_given_up: threading.Event) -> AsyncLLM:
    try:
        from vllm.v1.engine.async_llm import AsyncLLM
    except ImportError as error:
        raise ConfigError(
            "rollout", f"vLLM cannot be imported ({error})", "install rollmesh[rollout] or rollmesh[rollout-cpu]"
        ) from error
    try:
        with engine_folder(ModelFolder.read("model.path", settings.model.path)) as path:
            arguments = engine_args(settings, path)
            if is_given_up.is_set():
                raise RollMeshError("the start of vLLM was given up")
            return AsyncLLM.from_engine_args(arguments)
    except ValueError as error:  # vLLM's or pydantic's
        cause = _cause(error)
        raise ConfigError("rollout.engine", f"vLLM refuses it ({cause:.300})", hint(cause) or "correct it") from error
    except RollMeshError:
        raise
    except Exception as error:  # an error of vLLM or of a library that vLLM uses
        raise log.failed_start(error) from error


def _give_up(is_given_up: threading.Event) -> None:
    """Make a start fail that nobody waits for any more: stop the start before it makes processes, or end the processes.

    The engine's processes are the only children of this process.
    """
    is_given_up.set()
    for process in multiprocessing.active_children():
        process.terminate()


def _cause(error: ValueError) -> str:
    """Return the complaint of pydantic or vLLM, without pydantic's heading."""
    details = getattr(error, "errors", None)
    if not callable(details):
        return first_line(error)
    fault = details()[0]
    where = ".".join(map(str, fault["loc"]))
    message = str(fault["msg"]).removeprefix("Value error, ")
    return f"{where} = {fault['input']!r:.100}: {message}" if where else message


async def _in_thread(function: Callable[[], _T]) -> _T:
    """Run ``function`` in a daemon thread. Unlike the loop's own threads, a daemon thread that hangs delays no exit."""
    future: concurrent.futures.Future[_T] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001  the caller that awaits the future gets the error
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name="vllm-engine", daemon=True).start()
    return await asyncio.wrap_future(future)
