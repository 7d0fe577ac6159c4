"""The pool with real children: whatever the user's code does, each sample gets an outcome, never an invented reward."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from rollmesh.types import RetryableFailure, Score, ScoreOutcome
from services.reward.pool import RewardPool
from services.reward.process import RewardJob, read_reply
from tests.unit.reward.conftest import WriteFunction, running_pool


def job(query: str, label_json: str = "") -> RewardJob:
    return RewardJob(sample_id=f"train:0:1/{query[:20]}", query=query, prompt="", label_json=label_json)


def score_all(path: Path, queries: Sequence[str], **settings: object) -> list[ScoreOutcome]:
    """Submit all queries at once to a fresh pool and wait for the outcomes, however long one is in the line."""

    async def run() -> list[ScoreOutcome]:
        async with running_pool(path, **settings) as pool, asyncio.timeout(60):
            return list(await asyncio.gather(*(pool.submit(job(query), deadline_s=60.0) for query in queries)))

    return asyncio.run(run())


def in_pool(path: Path, body: Callable[[RewardPool], Awaitable[None]], **settings: object) -> None:
    async def run() -> None:
        async with running_pool(path, **settings) as pool, asyncio.timeout(60):
            await body(pool)

    asyncio.run(run())


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


DISPATCH = """
    import math, os, signal, sys, time

    def reward_func(queries, prompts, labels):
        query = queries[0]
        if query == "raise":
            return check(query)
        if query == "exit":
            os._exit(7)
        if query == "sys.exit":
            sys.exit(1)
        if query == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if query == "sleep":
            time.sleep(600)
        if query == "spin":
            while True: pass
        if query == "none":
            return None
        if query == "nan":
            return {"rewards": math.nan}
        if query == "close":
            os.closerange(3, 100)
            return 1.0
        return {"rewards": float(query), "extra_logs": {"length": len(query)}}

    def check(query):
        raise ValueError("no number in\\n" + query)
"""


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("raise", r"reward_func raised ValueError: no number in raise \(graders\.py:28\)"),
        ("exit", "the reward process ended with exit code 7 during the call"),
        ("sys.exit", r"reward_func raised SystemExit: 1 \(graders\.py:11\)"),
        ("kill", r"the reward process was killed by SIGKILL \(out of memory\?\) during the call"),
        ("sleep", r"reward_func took longer than the 1\.5 s of reward\.timeout_s"),
        ("spin", r"reward_func took longer than the 1\.5 s of reward\.timeout_s"),
        ("none", "reward_func returned None: None is not a number"),
        ("nan", r"reward_func returned {'rewards': nan}: rewards: nan is not a finite float32"),
        ("close", "the reward process .* during the call"),
    ],
)
def test_a_fault_is_a_retryable_failure_and_the_next_sample_is_scored(
    write_function: WriteFunction, query: str, reason: str
) -> None:
    timeout_s = 1.5 if query in ("sleep", "spin") else 20.0
    fault, after = score_all(write_function(DISPATCH), [query, "2.5"], timeout_s=timeout_s)
    assert isinstance(fault, RetryableFailure)
    assert re.fullmatch(reason, fault.reason), fault.reason
    assert after == Score(2.5, 2.5, {"length": 3.0})


def test_the_first_fault_of_a_kind_is_logged_with_its_sample_and_traceback(
    write_function: WriteFunction, caplog: pytest.LogCaptureFixture
) -> None:
    source = "def reward_func(q, p, l):\n    raise ValueError(q[0])"
    outcomes = score_all(write_function(source), [f"query {i}" for i in range(50)])
    assert {type(outcome) for outcome in outcomes} == {RetryableFailure}
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "[train:0:1/query 0]" in warnings[0]
    assert "Traceback" in warnings[0]


def test_prints_of_the_user_go_to_the_log_and_not_into_the_protocol(
    write_function: WriteFunction, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    source = """
        import os, subprocess, sys
        print("at import")
        def reward_func(queries, prompts, labels):
            print("printed", queries[0])
            print("to stderr", file=sys.stderr)
            os.write(1, b"raw \\xff bytes\\n")
            subprocess.run(["echo", "from a program"])
            print("\\ud800 unfinished line", end="")
            return 1
        """
    assert score_all(write_function(source), ["q"]) == [Score(1.0, 1.0, {})]
    lines = [record.getMessage() for record in caplog.records]
    expected = {"at import", "printed q", "to stderr", "raw \ufffd bytes", "from a program", "\\ud800 unfinished line"}
    assert expected <= set(lines)


def test_a_flood_of_output_neither_blocks_nor_fills_the_log(
    write_function: WriteFunction, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    source = """
        def reward_func(queries, prompts, labels):
            print("x" * 5_000_000)
            print("\\n".join(map(str, range(200_000))))
            return 1
        """
    assert score_all(write_function(source), ["q"]) == [Score(1.0, 1.0, {})]
    assert len(caplog.records) < 1000
    assert max(len(record.getMessage()) for record in caplog.records) < 3000
    assert any("further lines" in record.getMessage() for record in caplog.records)


def test_a_huge_or_odd_result_is_a_failure_with_a_short_reason(write_function: WriteFunction) -> None:
    source = """
        def reward_func(queries, prompts, labels):
            if queries[0] == "keys":
                return {"rewards": 1, "extra_logs": {f"{i:0>10000}": i for i in range(100_000)}}
            return ["y" * 50_000_000]
        """
    text, keys = score_all(write_function(source), ["text", "keys"])
    assert isinstance(text, RetryableFailure)
    assert len(text.reason) < 2000
    assert isinstance(keys, Score)
    assert len(keys.extra_logs) <= 256


def test_calls_run_side_by_side_in_as_many_processes_as_configured(write_function: WriteFunction) -> None:
    source = """
        import os, time
        def reward_func(queries, prompts, labels):
            time.sleep(0.5)
            return os.getppid()
        """
    path = write_function(source)

    async def body(pool: RewardPool) -> None:
        start = time.monotonic()
        outcomes = await asyncio.gather(*(pool.submit(job(str(i))) for i in range(12)))
        assert time.monotonic() - start < 12 * 0.5
        assert {outcome.reward for outcome in outcomes if isinstance(outcome, Score)} == set(map(float, pool.pids))

    in_pool(path, body, num_processes=3)


def test_one_stuck_call_does_not_hold_up_the_other_processes(write_function: WriteFunction) -> None:
    async def body(pool: RewardPool) -> None:
        stuck = pool.submit(job("sleep"))
        outcomes = await asyncio.gather(*(pool.submit(job(str(i))) for i in range(100)))
        assert [outcome.reward for outcome in outcomes if isinstance(outcome, Score)] == list(map(float, range(100)))
        assert not stuck.done()

    in_pool(write_function(DISPATCH), body, num_processes=2)


def test_samples_are_gathered_up_to_the_configured_number(write_function: WriteFunction) -> None:
    source = """
        def reward_func(queries, prompts, labels):
            return {"rewards": [float(q) for q in queries], "extra_logs": {"size": [len(queries)] * len(queries)}}
        """
    outcomes = score_all(write_function(source), [str(i) for i in range(10)], samples_per_call=4)
    assert [outcome.reward for outcome in outcomes if isinstance(outcome, Score)] == list(map(float, range(10)))
    sizes = [outcome.extra_logs["size"] for outcome in outcomes if isinstance(outcome, Score)]
    assert sizes == [4.0] * 8 + [2.0] * 2


def test_a_sample_behind_calls_that_hang_is_told_so(write_function: WriteFunction) -> None:
    path = write_function("import time\ndef reward_func(q, p, l): time.sleep(600)")

    async def scenario() -> ScoreOutcome:
        async with running_pool(path, timeout_s=0.3) as pool:
            for index in range(40):
                pool.submit(job(str(index)), deadline_s=60.0)
            return await pool.submit(job("last"), deadline_s=2.0)

    outcome = asyncio.run(scenario())
    assert isinstance(outcome, RetryableFailure)
    fault = "reward_func took longer than the 0.3 s of reward.timeout_s"
    assert outcome.reason == f"not scored within 2 s (the call before it: {fault})"


def test_a_sample_that_waits_beyond_its_deadline_is_answered_and_never_called(write_function: WriteFunction) -> None:
    source = """
        import pathlib, time
        def reward_func(queries, prompts, labels):
            with open(pathlib.Path(__file__).with_name("calls"), "a") as file:
                file.write(queries[0])
            while not pathlib.Path(__file__).with_name("go").exists():
                time.sleep(0.01)
            return 1
        """
    path = write_function(source)

    async def body(pool: RewardPool) -> None:
        first, second = pool.submit(job("a")), pool.submit(job("b"), deadline_s=0.1)
        cancelled, last = pool.submit(job("c")), pool.submit(job("d"))
        cancelled.cancel()
        outcome = await second
        assert isinstance(outcome, RetryableFailure)
        assert outcome.reason.startswith("not scored within 0.1 s")
        assert not first.done()
        path.with_name("go").touch()
        assert isinstance(await last, Score)

    in_pool(path, body)
    assert path.with_name("calls").read_text() == "ad"


def test_a_child_that_is_killed_between_calls_is_replaced(write_function: WriteFunction) -> None:
    path = write_function("import os\ndef reward_func(queries, prompts, labels):\n    return os.getpid()")

    async def body(pool: RewardPool) -> None:
        first = await pool.submit(job("1"))
        assert isinstance(first, Score)
        os.kill(int(first.reward), signal.SIGKILL)
        assert isinstance(await pool.submit(job("2")), RetryableFailure)
        second = await pool.submit(job("3"))
        assert isinstance(second, Score)
        assert second.reward != first.reward

    in_pool(path, body)


STARTS_PROCESSES = """
    import os, pathlib, subprocess, sys, time
    DAEMON = "import os, time; os.fork() and os._exit(0); os.setsid(); print(os.getpid(), flush=True); time.sleep(600)"
    def reward_func(queries, prompts, labels):
        child = subprocess.Popen(["sleep", "600"])
        session = subprocess.Popen(["sleep", "600"], start_new_session=True, env={})
        daemon = subprocess.Popen([sys.executable, "-c", DAEMON], stdout=subprocess.PIPE, start_new_session=True)
        fork = os.fork()
        if fork == 0:
            time.sleep(600)
        pids = f"{os.getpid()} {child.pid} {session.pid} {int(daemon.stdout.readline())} {fork}"
        pathlib.Path(__file__).with_name("written").write_text(pids)
        pathlib.Path(__file__).with_name("written").rename(pathlib.Path(__file__).with_name(queries[0]))
        if queries[0] == "exit":
            os._exit(3)
        if queries[0] == "group":
            os.killpg(0, 15)
        if queries[0] != "return":
            time.sleep(600)
        return 1.0
    """
"""A grader like those that run code: it leaves a child, a fork, a process in its own session, and a daemon."""


def test_processes_that_the_function_started_end_with_its_own(write_function: WriteFunction) -> None:
    path = write_function(STARTS_PROCESSES)
    names = ["exit", "group", "sleep", "return"]
    outcomes = score_all(path, names, timeout_s=3.0)
    assert [outcome.reason if isinstance(outcome, RetryableFailure) else outcome for outcome in outcomes] == [
        "the reward process ended with exit code 3 during the call",
        "the reward process was killed by SIGTERM during the call",
        "reward_func took longer than the 3 s of reward.timeout_s",
        Score(1.0, 1.0),
    ]
    for name in names:
        left = [pid for pid in map(int, path.with_name(name).read_text().split()) if is_alive(pid)]
        assert not left, f"{name}: {left} live on"


def test_no_child_outlives_a_service_that_is_killed(write_function: WriteFunction) -> None:
    path = write_function(STARTS_PROCESSES)
    script = """
import asyncio, pathlib, sys
from services.reward.pool import RewardPool
from tests.unit.reward.conftest import running_pool
from services.reward.process import RewardJob
async def main():
    async with running_pool(pathlib.Path(sys.argv[1]), num_processes=2) as pool:
        pool.submit(RewardJob("s", "sleep", "", ""))
        print(*pool.pids, flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""
    parent = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert wait_until(path.with_name("sleep").exists)
        pids += map(int, path.with_name("sleep").read_text().split())
        assert all(map(is_alive, pids))
    finally:
        parent.kill()
        parent.communicate(timeout=10)
    assert wait_until(lambda: not any(map(is_alive, pids)))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("executor", ["Pool(1).map", "ProcessPoolExecutor(1).map"])
@pytest.mark.parametrize("name", ["graders.py", "my-reward.v2.py"])
def test_a_function_may_use_a_pool_of_processes(tmp_path: Path, method: str, executor: str, name: str) -> None:
    path = tmp_path / name
    path.write_text(
        textwrap.dedent(
            f"""
            import multiprocessing, concurrent.futures
            from dataclasses import dataclass
            POOL = None
            class ProcessPoolExecutor(concurrent.futures.ProcessPoolExecutor):
                pass
            @dataclass
            class Task:
                text: str
            def grade(task):
                return float(len(task.text))
            def reward_func(queries, prompts, labels):
                global POOL
                context = multiprocessing.get_context("{method}")
                if POOL is None:
                    POOL = {"context.Pool(1)" if "Executor" not in executor else "ProcessPoolExecutor(1, context)"}
                return list(POOL.map(grade, map(Task, queries)))
            """
        )
    )
    assert score_all(path, ["abc", "de"], timeout_s=15.0) == [Score(3.0, 3.0), Score(2.0, 2.0)]


def test_a_child_imports_nothing_that_the_file_does_not(write_function: WriteFunction) -> None:
    source = """
        import sys
        HEAVY = ("torch", "numpy", "grpc", "google.protobuf", "pydantic", "rollmesh", "services", "asyncio")
        def reward_func(queries, prompts, labels):
            return {"rewards": 0, "extra_logs": {name: 1 for name in HEAVY if name in sys.modules}}
        """
    assert score_all(write_function(source), ["q"]) == [Score(0.0, 0.0, {})]


def test_alarms_of_the_users_code_work(write_function: WriteFunction) -> None:
    source = """
        import signal, time
        class Late(Exception): pass
        def late(*_): raise Late
        def reward_func(queries, prompts, labels):
            signal.signal(signal.SIGALRM, late)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            try:
                time.sleep(600)
            except Late:
                return -1
        """
    assert score_all(write_function(source), ["q"]) == [Score(-1.0, -1.0, {})]


@pytest.mark.parametrize(
    "reply",
    [
        None,
        [],
        {},
        {"rewards": [1.0], "scores": [1.0], "logs": [{}]},
        {"rewards": [1.0, 1.0], "scores": [1.0], "logs": [{}], "notes": {}},
        {"rewards": [1.0] * 2, "scores": [1.0] * 2, "logs": [{}] * 2, "notes": {}},
        {"rewards": [float("nan")], "scores": [1.0], "logs": [{}], "notes": {}},
        {"rewards": ["1"], "scores": [1.0], "logs": [{}], "notes": {}},
        {"rewards": [1.0], "scores": [1.0], "logs": [{"a": float("inf")}], "notes": {}},
        {"rewards": [1.0], "scores": [1.0], "logs": [3], "notes": {}},
        {"failure": "x"},
    ],
)
def test_a_forged_reply_is_no_answer(reply: object) -> None:
    with pytest.raises(ValueError):
        read_reply(reply, 1)


def test_a_child_that_floods_the_protocol_is_ended(write_function: WriteFunction) -> None:
    source = """
        import os, sys
        def reward_func(queries, prompts, labels):
            if queries[0] == "flood":
                os.write(int(sys.argv[1]), b"\\xff" * 1000)
            return 1
        """
    flood, after = score_all(write_function(source), ["flood", "q"])
    assert isinstance(flood, RetryableFailure)
    assert "disturbed the protocol" in flood.reason
    assert after == Score(1.0, 1.0, {})
