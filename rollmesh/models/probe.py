"""A probe of a loaded model: how sequences may share a forward pass, and whether the model's attention is right.

Only the outputs of an architecture show whether it keeps packed sequences apart. The probe runs three short random
sequences A, B, C alone and together, and measures:

* ``difference``: the largest change of an output from alone to together. It must be as small as rounding.
* ``disturbance``: the largest change of B's outputs when the tokens of A, in front of B in its row, are replaced. Both
  passes have the same shape, so a model that keeps A from B repeats its sums. Dense models change by exactly 0 in every
  dtype, so that ``disturbance`` shows leaks far below the rounding in ``difference``.

Both are compared with a full leak, in which the positions continue from A to B. So the bounds are smaller for an
untrained model, whose outputs hardly depend on earlier tokens. Where A does not change B even in a full leak, the probe
concludes nothing. The probe trains nothing and leaves the random generators as they were.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rollmesh.models.rows import Batching, Layout, Rectangle, lay_out
from rollmesh.types import Int32Array

_logger = logging.getLogger(__name__)

Forward = Callable[[Rectangle, Tensor, Tensor], Tensor]
"""Takes a rectangle, predictors int64 [N] and targets int64 [N]; returns outputs float32 [N]: a policy's
log-probabilities or a critic's values. All on the CPU, without gradient; collective where weights are partitioned."""
Maximum = Callable[[Sequence[float]], list[float]]
"""Returns the element-wise maximum over all ranks, so that all ranks decide alike."""

LENGTHS = (5, 7, 4)
"""Tokens of A, B and C: short, because a leak is strongest beside the boundary."""
_LAYOUTS: dict[Batching, Layout] = {
    Batching.PACKED: ((0, 1), (2,)),
    Batching.PACKED_IN_ONE_ROW: ((0, 1, 2),),
    Batching.PACKED_WITH_BOUNDARIES: ((0, 1, 2),),
    Batching.PADDED: ((0,), (1,), (2,)),
}


@dataclass(frozen=True, slots=True)
class Bounds:
    """The bounds of rounding for one dtype; `docs/models.md` has the measurements.

    In half precision the bounds of ``difference`` are wide, because rounding grows through the layers and another order
    of sums may send a token to another expert. ``disturbance`` has no rounding in it and finds the leaks.

    Attributes:
        of_outputs: bound of ``difference``, as a share of the largest output.
        of_leak: bound of ``difference``, as a share of the ``difference`` in a full leak.
        of_disturbance: bound of ``disturbance``, as a share of the ``disturbance`` in a full leak.
    """

    of_outputs: float
    of_leak: float
    of_disturbance: float


BOUNDS = {
    "float32": Bounds(2e-5, 0.01, 1e-4),
    "float16": Bounds(1e-2, 0.1, 5e-4),
    "bfloat16": Bounds(5e-2, 0.3, 2e-3),
}
_RESOLUTION = 1e-6
"""Resolution of outputs in float32, as a share of the largest output: smaller changes do not show."""


@dataclass(frozen=True, slots=True)
class BatchingTrial:
    """The result of one way of batching; see the module's docstring for ``difference`` and ``disturbance``."""

    difference: float
    disturbance: float
    is_right: bool


class ModelProbe:
    """The probe of one model. It runs 5 short forward passes when it is made, and 2 for each way of batching.

    Args:
        name: the model's name for the log.
        forward: runs the model.
        vocabulary: token ids lie below this number.
        dtype: the name of the parameters' dtype.
        maximum: the maximum over the ranks, which examine the model together.
    """

    def __init__(self, name: str, forward: Forward, vocabulary: int, dtype: str, maximum: Maximum) -> None:
        self.name = name
        self._forward = forward
        self._bounds = BOUNDS.get(dtype, BOUNDS["float32"])
        self._maximum = maximum
        random = np.random.default_rng(0)
        self._sequences = [random.integers(0, vocabulary, length).astype(np.int32) for length in LENGTHS]
        shift = random.integers(1, max(2, vocabulary), LENGTHS[0])
        other = ((self._sequences[0] + shift) % vocabulary).astype(np.int32)
        self._others = [other, *self._sequences[1:]]
        self._alone = [self._run_alone(index) for index in range(len(LENGTHS))]
        self._scale, self._leak, self._sensitivity = self._measure_leak()

    @property
    def can_see_leaks(self) -> bool:
        """Whether A changes B's outputs in a full leak."""
        return self._sensitivity > self._floor

    @property
    def _floor(self) -> float:
        return _RESOLUTION * self._scale

    @property
    def tolerance(self) -> float:
        """The largest ``difference`` that counts as rounding."""
        return max(self._floor, min(self._bounds.of_outputs * self._scale, self._bounds.of_leak * self._leak))

    def examine(self, batching: Batching) -> BatchingTrial:
        """Try one way of batching. Collective."""
        difference, disturbance = self._maximum(self._compare(batching))
        limit = max(self._floor, self._bounds.of_disturbance * self._sensitivity)
        is_right = difference <= self.tolerance and disturbance <= limit
        return BatchingTrial(difference, disturbance, is_right and (self.can_see_leaks or not batching.is_packed))

    def _compare(self, batching: Batching) -> tuple[float, float]:
        """Return difference and disturbance; both are infinite where the model does not take the boundaries."""
        layout, disturbance = _LAYOUTS[batching], 0.0
        try:
            together = self._run(self._sequences, layout, batching)
            if batching.is_packed:
                disturbed = self._run(self._others, layout, batching)
                disturbance = _largest(disturbed[1:2], together[1:2])
        except (TypeError, ValueError, RuntimeError):
            if batching is not Batching.PACKED_WITH_BOUNDARIES:
                raise
            return math.inf, math.inf
        return _largest(together, self._alone), disturbance

    def change_since(self) -> float:
        """Return the change of B's outputs since the probe was made, when the model's settings changed. Collective."""
        return self._maximum([_largest([self._run_alone(1)], self._alone[1:2])])[0]

    def _run_alone(self, index: int) -> Tensor:
        return self._run(self._sequences, ((index,),), Batching.SINGLE)[0]

    def _measure_leak(self) -> tuple[float, float, float]:
        """Return the largest output, and the difference and the disturbance of B in a full leak."""
        seeing, seeing_other = (
            self._run(sequences, ((0, 1),), Batching.PACKED, are_joined=True)[1]
            for sequences in (self._sequences, self._others)
        )
        scale = max(1.0, *(float(outputs.abs().max()) for outputs in self._alone))
        leak, sensitivity = _largest([seeing], self._alone[1:2]), _largest([seeing], [seeing_other])
        first, second, third = self._maximum([scale, leak, sensitivity])
        return first, second, third

    def _run(
        self, sequences: Sequence[Int32Array], layout: Layout, batching: Batching, are_joined: bool = False
    ) -> list[Tensor]:
        """Return the outputs of each sequence of the layout, at all tokens but the last."""
        rectangle = lay_out(sequences, layout, batching)
        if are_joined:
            rectangle.position_ids.copy_(torch.arange(rectangle.position_ids.shape[1]))
        counts = [len(sequences[index]) - 1 for row in layout for index in row]
        predictors = torch.cat(
            [torch.arange(start, start + count) for start, count in zip(rectangle.starts, counts, strict=True)]
        )
        targets = rectangle.input_ids.flatten()[predictors + 1]
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
        with torch.random.fork_rng(devices):  # code in a model folder may draw here
            outputs = self._forward(rectangle, predictors, targets)
        return list(torch.split(outputs, counts))


def ways_of_batching(attentions: Sequence[str], may_pack: bool) -> list[Batching]:
    """Return the ways of batching to try, the cheapest first.

    Args:
        attentions: the implementations that the models compute with.
        may_pack: whether sequences may share rows.
    """
    if not may_pack:
        return [Batching.PADDED]
    needs_one_row = any("flash" in attention for attention in attentions)
    packed = Batching.PACKED_IN_ONE_ROW if needs_one_row else Batching.PACKED
    return [packed, Batching.PACKED_WITH_BOUNDARIES, Batching.PADDED]


def choose_batching(probes: Sequence[ModelProbe], candidates: Sequence[Batching], should_log: bool = True) -> Batching:
    """Return the first way of batching that is right for all models, or `SINGLE` if none is. Collective.

    Args:
        probes: the probes of the models that read the same rectangles.
        candidates: the ways to try, the cheapest first.
        should_log: log the choice, in one sentence for each model; on one rank only.
    """
    tried: list[tuple[Batching, list[BatchingTrial]]] = []
    choice = Batching.SINGLE
    for batching in candidates:
        tried.append((batching, [probe.examine(batching) for probe in probes]))
        if all(finding.is_right for finding in tried[-1][1]):
            choice = batching
            break
    if should_log:
        for number, probe in enumerate(probes):
            _log(probe, choice, [(batching, findings[number]) for batching, findings in tried])
    return choice


def _log(probe: ModelProbe, choice: Batching, tried: Sequence[tuple[Batching, BatchingTrial]]) -> None:
    wrong = [
        f"{batching} they differ from single passes by up to {finding.difference:.1e} "
        f"and by up to {finding.disturbance:.1e} when a neighbour's tokens change"
        for batching, finding in tried
        if not finding.is_right
    ]
    sentence = f"{probe.name}: sequences are batched as {choice!s}"
    if not wrong:
        _logger.info("%s; they differ from single passes by up to %.1e", sentence, tried[-1][1].difference)
    elif probe.can_see_leaks:
        _logger.warning("%s, because %s (rounding is below %.1e)", sentence, "; ".join(wrong), probe.tolerance)
    else:
        _logger.warning("%s, because the outputs do not yet depend on earlier tokens, so no leak would show", sentence)


def _largest(outputs: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Return the largest absolute difference; infinite where a difference is not a number."""
    worst = max(float((a - b).abs().max()) for a, b in zip(outputs, others, strict=True))
    return math.inf if math.isnan(worst) else worst
