"""What the probe concludes, of models whose faults are known."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rollmesh.models.probe import ModelProbe, choose_batching, ways_of_batching
from rollmesh.models.rows import Batching, Rectangle
from services.learner.policy import PolicyModel
from tests.unit.models.architectures import make_model
from tests.unit.models.table import choose, make_probe

ALL = [Batching.PACKED, Batching.PACKED_WITH_BOUNDARIES, Batching.PADDED]


class RunningMean:
    """A model whose output at a position is the mean of the tokens so far, in its sequence or in its whole row.

    Args:
        follows: which hint it follows: "positions", "boundaries", or "nothing".
        size: outputs are multiplied by it.
        sees_padding: the length of the rows changes the outputs.
    """

    def __init__(self, follows: str, size: float = 1.0, sees_padding: bool = False) -> None:
        self._follows, self._size, self._sees_padding = follows, size, sees_padding

    def __call__(self, rectangle: Rectangle, predictors: Tensor, _targets: Tensor) -> Tensor:
        ids, starts = rectangle.input_ids.float(), self._starts(rectangle)
        rows = []
        for row, first in zip(ids, starts, strict=True):
            rows.append(torch.stack([row[int(first[p]) : p + 1].mean() for p in range(len(row))]))
        outputs = torch.stack(rows) + (ids.shape[1] if self._sees_padding else 0)
        return self._size * outputs.flatten()[predictors]

    def _starts(self, rectangle: Rectangle) -> Tensor:
        """Where the sequence of each position begins, as this model sees it."""
        places = torch.arange(rectangle.input_ids.shape[1]).expand_as(rectangle.input_ids)
        if self._follows == "positions":
            return places - rectangle.position_ids
        if self._follows == "boundaries" and rectangle.boundaries is not None:
            return rectangle.boundaries.cu_seq_lens[:-1].long()[rectangle.boundaries.seq_idx.long()]
        return torch.zeros_like(places)


def _probe(model: RunningMean, vocabulary: int = 50) -> ModelProbe:
    return ModelProbe("fake", model, vocabulary, "float32", list)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (RunningMean("positions"), Batching.PACKED),
        (RunningMean("boundaries"), Batching.PACKED_WITH_BOUNDARIES),
        (RunningMean("nothing"), Batching.PADDED),
        (RunningMean("nothing", sees_padding=True), Batching.SINGLE),
        (RunningMean("nothing", size=1e-4), Batching.PADDED),
        (RunningMean("positions", size=1e3), Batching.PACKED),
        (RunningMean("positions", size=float("nan")), Batching.SINGLE),
    ],
)
def test_the_cheapest_way_that_a_model_gets_right_is_taken(model: RunningMean, expected: Batching) -> None:
    assert choose_batching([_probe(model)], ALL) is expected


def test_a_vocabulary_of_two_tokens_is_enough() -> None:
    assert choose_batching([_probe(RunningMean("positions"), 2)], ALL) is Batching.PACKED
    assert choose_batching([_probe(RunningMean("nothing"), 2)], ALL) is Batching.PADDED


def test_nothing_is_packed_where_no_leak_would_show(caplog: pytest.LogCaptureFixture) -> None:
    assert choose_batching([_probe(RunningMean("nothing", size=0.0))], ALL) is Batching.PADDED
    assert caplog.messages == [
        "fake: sequences are batched as padded, because the outputs do not yet depend on earlier tokens, "
        "so no leak would show"
    ]


def test_two_models_that_read_the_same_rows_agree() -> None:
    probes = [_probe(RunningMean("positions")), _probe(RunningMean("nothing"))]
    assert choose_batching(probes, ALL) is Batching.PADDED


def test_a_model_that_takes_no_boundaries_is_padded() -> None:
    class Refusing(RunningMean):
        def __call__(self, rectangle: Rectangle, predictors: Tensor, targets: Tensor) -> Tensor:
            if rectangle.boundaries is not None:
                raise TypeError("unexpected keyword argument 'seq_idx'")
            return super().__call__(rectangle, predictors, targets)

    assert choose_batching([_probe(Refusing("nothing"))], ALL) is Batching.PADDED


def test_what_one_rank_finds_decides_for_all() -> None:
    def found_elsewhere(values: Sequence[float]) -> list[float]:
        return [max(value, 0.5) for value in values]

    probe = ModelProbe("fake", RunningMean("positions"), 50, "float32", found_elsewhere)
    assert choose_batching([probe], ALL) is Batching.SINGLE


def test_the_log_says_once_what_was_found_and_done(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    choose_batching([_probe(RunningMean("positions"))], ALL)
    choose_batching([_probe(RunningMean("nothing"))], ALL)
    choose_batching([_probe(RunningMean("nothing"))], ALL, should_log=False)
    right, wrong = caplog.messages
    assert right == "fake: sequences are batched as packed; they differ from single passes by up to 0.0e+00"
    assert wrong.startswith("fake: sequences are batched as padded, because packed they differ from single passes by ")
    assert "when a neighbour's tokens change; packed in one row, with boundaries they differ" in wrong


def test_flash_attention_packs_in_one_row_and_packing_may_be_off() -> None:
    assert ways_of_batching(["sdpa"], may_pack=True) == ALL
    assert ways_of_batching(["sdpa", "flash_attention_2"], may_pack=True)[0] is Batching.PACKED_IN_ONE_ROW
    assert ways_of_batching(["flash_attention_2"], may_pack=False) == [Batching.PADDED]


@pytest.mark.parametrize(("architecture", "expected"), [("llama", Batching.PACKED), ("lfm2", Batching.PADDED)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [0.02, 0.3])
def test_untrained_models_and_half_precision_do_not_deceive(
    architecture: str, expected: Batching, dtype: str, size: float
) -> None:
    model = make_model(architecture, initializer_range=size).to(getattr(torch, dtype))
    assert choose_batching([make_probe(PolicyModel(model, 1.0), dtype)], ALL, should_log=False) is expected


def test_the_random_generators_are_left_as_they_were() -> None:
    model = make_model("llama")
    model.register_forward_pre_hook(lambda *_: torch.rand(1) and None)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    choose(model)
    assert torch.equal(torch.get_rng_state(), state)
