"""The step and the version with which a learner goes on."""

from __future__ import annotations

import logging

import pytest

from rollmesh.errors import ConfigError
from rollmesh.types import PolicyVersion
from services.learner.start import choose_step, next_version


def version(text: str) -> PolicyVersion:
    return PolicyVersion.parse(text)


@pytest.mark.parametrize(
    ("saved", "possible", "expected"),
    [
        ([], range(1), 0),
        ([], range(4), 0),
        ([2, 4], range(2, 6), 4),
        ([2, 4], range(5), 4),
        ([4], range(4, 5), 4),
    ],
    ids=["a new run", "no checkpoint yet", "the newest", "nothing retired yet", "the last step"],
)
def test_a_run_goes_on_from_its_newest_checkpoint(saved: list[int], possible: range, expected: int) -> None:
    assert choose_step(saved, possible) == expected


def test_a_checkpoint_that_the_ledger_has_not_heard_of_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose_step([2, 4, 6], range(2, 6)) == 4
    assert "the checkpoint of step 6 is newer than the ledger" in caplog.text


def test_a_run_whose_checkpoints_are_gone_is_refused() -> None:
    with pytest.raises(ConfigError, match="no checkpoint of step 4 or later is left, and the groups of earlier steps"):
        choose_step([2], range(4, 7))


def test_a_ledger_that_lost_everything_is_no_reason_to_train_from_the_start() -> None:
    with pytest.raises(ConfigError, match="the checkpoint of step 4 is newer than the ledger, which knows 0 steps"):
        choose_step([2, 4], range(1))


@pytest.mark.parametrize(
    ("saved", "newest", "expected"),
    [
        ("0.0", None, "0.0"),
        ("0.0", "0.0", "0.0"),
        ("0.6", "0.6", "0.6"),
        ("0.7", "0.6", "0.7"),
        ("0.6", "0.8", "1.9"),
        ("0.0", "0.3", "1.4"),
        ("1.9", "2.11", "3.12"),
        ("1.9", "1.9", "1.9"),
    ],
)
def test_a_lineage_begins_where_a_newer_version_may_have_served(saved: str, newest: str | None, expected: str) -> None:
    assert next_version(version(saved), None if newest is None else version(newest)) == version(expected)
