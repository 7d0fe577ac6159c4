"""The child's code loads the user's file and reads the function's result; the tests run it in this process."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from services.reward import child


@pytest.mark.parametrize(
    "value",
    [
        1,
        True,
        1.0,
        [1],
        (1.0,),
        [[1.0]],
        np.float32(1),
        np.ones(1),
        np.ones((1, 1), np.int64),
        [np.ones(1)],
        Decimal(1),
        Fraction(1, 1),
        {"rewards": 1},
        {"rewards": [np.array(1)], "scores": None, "extra_logs": None},
    ],
)
def test_every_shape_of_one_number_is_a_reward(value: Any) -> None:
    reply = child.read_result(value, 1)
    assert reply == {"rewards": [1.0], "scores": [1.0], "logs": [{}], "notes": {}}
    assert type(reply["rewards"][0]) is float


def test_tensors_of_any_type_are_rewards_and_logs() -> None:
    torch = pytest.importorskip("torch")
    result = {
        "rewards": torch.tensor([1, 0]),
        "scores": torch.tensor([0.5, 0.25], dtype=torch.bfloat16, requires_grad=True),
        "extra_logs": {"tries": torch.tensor([[3.0], [4.0]]), "shared": torch.tensor(2.0)},
    }
    reply = child.read_result(result, 2)
    assert reply["rewards"] == [1.0, 0.0]
    assert reply["scores"] == [0.5, 0.25]
    assert reply["logs"] == [{"tries": 3.0, "shared": 2.0}, {"tries": 4.0, "shared": 2.0}]


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (None, "reward_func returned None: None is not a number"),
        ("1.0", "reward_func returned '1.0': '1.0' is not a number"),
        ([], "reward_func returned []: 0 values for 1 sample"),
        ([1.0, 2.0], "reward_func returned [1.0, 2.0]: 2 values for 1 sample"),
        ({"reward": 1.0}, "reward_func returned {'reward': 1.0}: there is no \"rewards\" in it"),
        ({"rewards": None}, "reward_func returned {'rewards': None}: rewards: None is not a number"),
        ({"rewards": 1.0, "scores": "x"}, "{'rewards': 1.0, 'scores': 'x'}: scores: 'x' is not a number"),
        ({"rewards": 1.0, "scores": []}, "{'rewards': 1.0, 'scores': []}: scores: 0 values for 1 sample"),
        (math.nan, "reward_func returned nan: nan is not a finite float32"),
        ([-math.inf], "reward_func returned [-inf]: -inf is not a finite float32"),
        (1e39, "reward_func returned 1e+39: 1e+39 is not a finite float32"),
        (10**400, "is not a finite float32"),
        (1j, "reward_func returned 1j: 1j is not a number"),
        (np.array(["x"]), "'x' is not a number"),
        (iter([1.0]), "is not a number"),
    ],
)
def test_what_is_no_reward_is_refused_naming_the_value(value: Any, sentence: str) -> None:
    with pytest.raises(child.ResultError) as caught:
        child.read_result(value, 1)
    assert sentence in str(caught.value)


def test_one_number_is_refused_for_several_samples() -> None:
    with pytest.raises(child.ResultError, match="1 value for 3 samples"):
        child.read_result(0.5, 3)


def test_extra_logs_that_are_no_finite_numbers_are_left_out_and_noted() -> None:
    logs = {"good": [1, 2], "text": "abc", "partly": [1.0, math.nan], "short": [1.0], 7: [3, 4]}
    reply = child.read_result({"rewards": [0, 1], "extra_logs": logs}, 2)
    assert reply["logs"] == [{"good": 1.0, "partly": 1.0, "7": 3.0}, {"good": 2.0, "7": 4.0}]
    assert set(reply["notes"]) == {"text", "partly", "short"}
    assert reply["notes"]["short"] == "extra_logs['short'] has 1 value for 2 samples"


def test_the_first_element_of_a_longer_log_counts_for_a_single_sample() -> None:
    assert child.read_result({"rewards": 0, "extra_logs": {"x": np.arange(3) + 5}}, 1)["logs"] == [{"x": 5.0}]


def test_a_long_or_broken_value_is_cut_in_the_reason() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise KeyError

    for value in ("y" * 100_000, Broken(), "\ud800"):
        with pytest.raises(child.ResultError) as caught:
            child.read_result(value, 1)
        assert len(str(caught.value).encode("utf-8")) < 3000


def test_labels_are_the_values_of_the_json_and_empty_text_where_there_is_none() -> None:
    seen: list[Any] = []

    def reward_func(queries: list[str], prompts: list[str], labels: list[Any]) -> list[float]:
        seen.extend(zip(queries, prompts, labels, strict=True))
        return [0.0] * len(queries)

    texts = ["", '"4"', "4", "123456789012345678901234567890", '{"a": [1, null]}']
    request = {"queries": list("abcde"), "prompts": list("vwxyz"), "labels": texts}
    child.call_function(reward_func, "/nowhere.py", request)
    assert [label for _, _, label in seen] == ["", "4", 4, 123456789012345678901234567890, {"a": [1, None]}]
    assert seen[0][:2] == ("a", "v")
