"""Every setting has a rule for a resume, and a change that would break the run is refused in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from rollmesh.config import Section, merge, validate
from rollmesh.errors import ConfigError
from services.config import MeshConfig
from services.launcher.resume_rules import FIXED, FREE, LIMITED, check_changes

Tree = dict[str, Any]
FREE_FIELDS = [field for fields in FREE.values() for field in fields]
FIXED_FIELDS = [field for fields in FIXED.values() for field in fields]


def _leaves(section: type[Section], above: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
        if not inner or type(None) in kinds:
            yield above + name
        for kind in inner:
            yield from _leaves(kind, f"{above}{name}.")


def test_every_setting_has_exactly_one_rule() -> None:
    ruled = [*FREE_FIELDS, *FIXED_FIELDS, *LIMITED]
    assert sorted(ruled) == sorted(set(ruled))
    assert set(ruled) == set(_leaves(MeshConfig))


def _config(tree: Tree, above: Tree | None = None) -> MeshConfig:
    return validate(MeshConfig, merge(tree, above or {}))


def _tree_of(field: str, value: object) -> Tree:
    tree: Any = value
    for part in reversed(field.split(".")):
        tree = {part: tree}
    assert isinstance(tree, dict)
    return tree


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("run.seed", 2, "run.seed: 2 differs from the 1 of the run so far"),
        ("model.max_length", 9, "the ledger knows prompts by their place in the data"),
        ("training.prompts_per_step", 2, "set it back to 1, or start a run anew"),
        ("training.steps", 1, "it may only grow; use 2 or more, or start a run anew"),
        ("training.max_staleness", 0, "older groups wait in Redis"),
        ("algorithm.advantage.estimator", "gae", "whether the checkpoint holds a critic"),
        ("learner.ema_beta", 0.9, "learner.ema_beta: 0.9 differs from the none of the run so far"),
        ("learner.optimizer.betas", [0.8, 0.9], "the checkpoint holds the optimiser with the old value"),
        ("replay.url", "redis://host:6379", "the groups of the run are in that Redis"),
    ],
)
def test_a_change_that_would_break_the_run_is_refused(tree: Tree, field: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_changes(_config(tree), _config(tree, _tree_of(field, value)))
    assert str(caught.value).startswith(f"{field}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("training.steps", 8, "training.steps: 2 → 8"),
        ("training.max_staleness", 3, "training.max_staleness: 1 → 3"),
        ("learner.optimizer.lr", 1e-5, "learner.optimizer.lr: 1e-06 → 1e-05"),
        ("rollout.num_workers", 2, "rollout.num_workers: 1 → 2"),
        ("rollout.engine.extra", {"seed": 1}, "rollout.engine.extra: {} → {'seed': 1}"),
        ("evaluation", {"data": {"path": "heldout.jsonl"}}, "evaluation: none → a section"),
    ],
)
def test_a_change_that_is_free_is_named(tree: Tree, field: str, value: object, line: str) -> None:
    changes = check_changes(_config(tree), _config(tree, _tree_of(field, value)))
    assert [str(change) for change in changes] == [line]


def test_another_variant_of_the_loss_is_named_by_its_settings(tree: Tree) -> None:
    changes = check_changes(_config(tree), _config(tree, {"algorithm": {"loss": {"type": "cispo"}}}))
    assert "algorithm.loss.type: ppo → cispo" in [str(change) for change in changes]


def test_nothing_changes_where_nothing_was_changed(tree: Tree, tmp_path: Path) -> None:
    moved = {"run": {"directory": str(tmp_path / "elsewhere"), "id": "12345678"}}
    assert check_changes(_config(tree), _config(tree, moved)) == []


def test_a_redis_may_have_another_password_and_messages_show_none(tree: Tree) -> None:
    here, again, there = (
        _config(tree, {"replay": {"url": f"redis://:{password}@{host}:6379"}})
        for password, host in (("hunter2", "here"), ("hunter3", "here"), ("hunter2", "there"))
    )
    assert [str(change) for change in check_changes(here, again)] == [
        "replay.url: redis://***@here:6379 → redis://***@here:6379"
    ]
    with pytest.raises(ConfigError, match=r"replay\.url: redis://\*\*\*@there:6379 differs") as caught:
        check_changes(here, there)
    assert "hunter" not in str(caught.value)
