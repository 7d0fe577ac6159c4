"""Sequences in rectangles."""

from __future__ import annotations

from typing import Any

import numpy as np

from rollmesh.models.rows import AcceptedInputs, Batching, lay_out

A, B, C = (np.array(ids, np.int32) for ids in ([5, 6, 7, 8], [9, 10], [11]))


def test_rows_are_filled_from_the_left_and_positions_restart_with_every_sequence() -> None:
    rectangle = lay_out([A, B, C], ((0,), (1, 2)), Batching.PACKED)
    assert rectangle.input_ids.tolist() == [[5, 6, 7, 8], [9, 10, 11, 0]]
    assert rectangle.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 0, 1]]
    assert rectangle.starts == (0, 4, 6)
    assert rectangle.boundaries is None


def test_a_row_with_boundaries_says_where_its_sequences_begin() -> None:
    boundaries = lay_out([A, B, C], ((2, 0, 1),), Batching.PACKED_WITH_BOUNDARIES).boundaries
    assert boundaries is not None
    assert boundaries.cu_seq_lens.tolist() == [0, 1, 5, 7]
    assert boundaries.seq_idx.tolist() == [[0, 1, 1, 1, 1, 2, 2]]
    assert boundaries.max_length == 4


class _Named:
    def forward(self, input_ids: Any, position_ids: Any = None, seq_idx: Any = None) -> None: ...


class _Open:
    def forward(self, input_ids: Any, **kwargs: Any) -> None: ...


class _Closed:
    def forward(self, input_ids: Any) -> None: ...


def test_a_model_is_given_only_what_its_forward_pass_takes() -> None:
    rectangle = lay_out([A, B], ((0, 1),), Batching.PACKED_WITH_BOUNDARIES)
    positions, boundaries = rectangle.position_ids, rectangle.boundaries
    names = {"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
    assert set(AcceptedInputs(_Named())(positions, boundaries)) == {"position_ids", "seq_idx"}
    assert set(AcceptedInputs(_Open())(positions, boundaries)) == names
    assert AcceptedInputs(_Closed())(positions, boundaries) == {}
    assert set(AcceptedInputs(_Open())(positions, None)) == {"position_ids"}
