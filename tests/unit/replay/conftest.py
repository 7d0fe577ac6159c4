"""One real server for all tests of the replay package, and groups to put into it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import redis

from rollmesh.replay.connection import connect_blocking
from rollmesh.replay.embedded import EmbeddedRedis
from rollmesh.types import Group, PolicyVersion, PromptId, Sample, Score, StopReason, Turn, VersionSpan

_run_numbers = itertools.count()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis.start(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def url(server: EmbeddedRedis) -> str:
    return server.url


@pytest.fixture
def run_id() -> str:
    """A run that nobody else uses, so that tests share the server without seeing each other."""
    return f"run-{next(_run_numbers)}"


@pytest.fixture
def raw(url: str) -> Iterator[redis.Redis]:
    """A plain client, to look at what is stored and to play the clock."""
    client = connect_blocking(url, 5.0)
    yield client
    client.close()


def _make_group(
    prompt_id: PromptId, sequence: int = 0, attempt: int = 0, num_tokens: int = 5, version: int | PolicyVersion = 0
) -> Group:
    if isinstance(version, int):
        version = PolicyVersion(0, version)
    samples = tuple(
        Sample(
            sample_id=f"{prompt_id}/{index}/{attempt}",
            index=index,
            prompt_id=prompt_id,
            prompt_token_ids=np.arange(3, dtype=np.int32),
            response_token_ids=np.arange(num_tokens, dtype=np.int32),
            turns=(Turn(num_tokens, 0, StopReason.STOP),),
            behaviour_logprobs=np.linspace(-1, 0, num_tokens, dtype=np.float32),
            version_spans=(VersionSpan(version, 0, num_tokens),),
            score=Score(reward=float(index), score=float(index)),
        )
        for index in range(2)
    )
    return Group(str(prompt_id), prompt_id, sequence, attempt, samples)


@pytest.fixture
def make_group() -> Callable[..., Group]:
    return _make_group


@pytest.fixture
def short_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("r")
