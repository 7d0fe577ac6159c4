"""The demo's warm-up ends with a model that can tell right tries from wrong ones, or not at all."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path("examples/operators").resolve()))
import build
from task import VOCABULARY


def foreseeing(*, is_contrary: bool):
    """A model that knows the next token, or always the wrong verdict."""
    swapped = {VOCABULARY.index("ok"): VOCABULARY.index("no"), VOCABULARY.index("no"): VOCABULARY.index("ok")}

    def model(input_ids: torch.Tensor) -> SimpleNamespace:
        following = input_ids.roll(-1, dims=1)
        if is_contrary:
            following = following.clone().apply_(lambda token: swapped.get(token, token))
        return SimpleNamespace(logits=F.one_hot(following, len(VOCABULARY)).float())

    return model


def test_only_verdicts_are_judged() -> None:
    tokenizer = build.build_tokenizer()
    assert build.share_of_right_verdicts(foreseeing(is_contrary=False), tokenizer) == 1.0
    assert build.share_of_right_verdicts(foreseeing(is_contrary=True), tokenizer) == 0.0


def test_a_warm_up_is_prolonged_until_verdicts_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    shares, rounds = iter([0.5, 0.7, 0.96]), []
    monkeypatch.setattr(build, "share_of_right_verdicts", lambda *_: next(shares))
    monkeypatch.setattr(build, "warm_up", lambda *arguments: rounds.append(arguments[-1]))
    build.warm_up_until_it_can_tell(None, build.build_tokenizer(), seed=0, num_steps=20, enough=0.95)
    assert rounds == [20, build.MORE_STEPS, build.MORE_STEPS]


def test_a_warm_up_that_teaches_no_verdicts_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build.build_tokenizer()
    monkeypatch.setattr(build, "MORE_STEPS", 1)
    judge, judged = build.share_of_right_verdicts, []
    monkeypatch.setattr(
        build, "share_of_right_verdicts", lambda *arguments: judged.append(judge(*arguments)) or judged[-1]
    )
    with pytest.raises(SystemExit, match="taught no verdicts; choose another --seed"):
        build.warm_up_until_it_can_tell(build.build_model(tokenizer), tokenizer, seed=0, num_steps=1, enough=1.0)
    assert len(judged) == 1 + build.MOST_ROUNDS  # the last prolongation is judged as well
