"""The header of a stored group: its fields, and the rules for the fields.

`check_header` applies the same rules to a header that is about to be stored and to a header that was read.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from rollmesh.errors import InvalidArgumentError
from rollmesh.types import StopReason

STOP_REASONS = {reason.value: reason for reason in StopReason}


@dataclasses.dataclass
class Header:
    """A group without its arrays. The fields are stored in this order. ``[S]`` is a list with one item per sample."""

    group_id: str
    prompt_id: list[Any]
    """dataset, epoch, index."""
    sequence: int
    attempt: int
    datasource: str
    """Empty in schema 2, which has no such field."""
    sample_ids: list[str]
    """[S]"""
    indexes: list[int]
    """[S], strictly growing."""
    prompt_lengths: list[int]
    """[S], P of each sample."""
    response_lengths: list[int]
    """[S], R of each sample."""
    has_reference: list[bool]
    """[S]"""
    scores: list[Any]
    """[S], nil or [reward, score, {name: float}]."""
    num_turns: list[int]
    """[S]"""
    generated_tokens: list[int]
    """For each turn: first the turns of the first sample, then the turns of the second sample, and so on."""
    environment_tokens: list[int]
    """For each turn."""
    stop_reasons: list[str]
    """For each turn."""
    num_versions: list[int]
    """[S]"""
    lineages: list[int]
    """For each version span, in the same order as the turns."""
    numbers: list[int]
    """For each version span."""
    span_lengths: list[int]
    """For each version span."""

    def generated_lengths(self) -> list[int]:
        """[S]: the number of generated tokens (G) of each sample."""
        return [sum(turns) for turns in split(self.generated_tokens, self.num_turns)]

    def reference_lengths(self) -> list[int]:
        """[S]: the number of reference log-probabilities of each sample; 0 for a sample without references."""
        return [length * has for length, has in zip(self.response_lengths, self.has_reference, strict=True)]


FIELD_NAMES = tuple(field.name for field in dataclasses.fields(Header))
_OF_SAMPLES = ("indexes", "prompt_lengths", "response_lengths", "has_reference", "scores", "num_turns", "num_versions")
_OF_TURNS = ("generated_tokens", "environment_tokens", "stop_reasons")
_OF_SPANS = ("lineages", "numbers", "span_lengths")
_TYPES = {"sample_ids": str, "stop_reasons": str, "has_reference": bool}
"""Types of the items of lists. The items of all other lists are counts."""


def check_header(header: Header) -> None:
    """Check the types and lengths of all lists, then the sums of each sample. O(samples + turns + spans).

    Raises:
        InvalidArgumentError: a rule is broken; ``field`` says where.
    """
    _check_group(header)
    fields = vars(header)
    _check_list("sample_ids", header.sample_ids)
    for name in _OF_SAMPLES:
        _check_list(name, fields[name], len(header.sample_ids))
    for names, counts in ((_OF_TURNS, header.num_turns), (_OF_SPANS, header.num_versions)):
        for name in names:
            _check_list(name, fields[name], sum(counts))
    if not header.sample_ids:
        raise InvalidArgumentError("payload has no samples", "payload.sample_ids")
    if any(low >= high for low, high in itertools.pairwise(header.indexes)):
        raise InvalidArgumentError(f"samples are not in order of index: {header.indexes}", "samples")
    for i, score in enumerate(header.scores):
        if score is not None:
            _check_score(f"samples[{i}]", score)
    _check_lengths(header)


def _check_group(header: Header) -> None:
    for name, text in (("group_id", header.group_id), ("datasource", header.datasource)):
        if type(text) is not str:
            raise refusal("payload", name, f"is {text!r:.40}, not a string")
    for name, value in (("sequence", header.sequence), ("attempt", header.attempt)):
        if type(value) is not int or value < 0:
            raise refusal("payload", name, f"is {value!r:.40}, not a count")
    prompt_id = header.prompt_id
    if type(prompt_id) is not list or [type(part) for part in prompt_id] != [str, int, int] or min(prompt_id[1:]) < 0:
        raise refusal("payload", "prompt_id", f"is {prompt_id!r:.60}, not [dataset, epoch, index]")


def _check_list(name: str, items: object, length: int | None = None) -> None:
    """Check that ``items`` is a list, that its items have the field's type, and that there are ``length`` of them.

    ``length`` None allows any number of items.
    """
    if type(items) is not list:
        raise refusal("payload", name, f"is a {type(items).__name__}, not a list")
    if length is not None and len(items) != length:
        raise refusal("payload", name, f"has {len(items)} items, not {length}")
    if not items or name == "scores":
        return
    kind = _TYPES.get(name, int)
    if set(map(type, items)) != {kind} or (kind is int and min(items) < 0):
        raise refusal("payload", name, f"has items that are not {'counts' if kind is int else kind.__name__}")


def _check_score(field: str, score: Any) -> None:
    if type(score) is not list or [type(part) for part in score] != [float, float, dict]:
        raise refusal(field, "score", f"is {score!r:.60}, not [reward, score, logs]")
    reward, value, logs = score
    if logs and (set(map(type, logs)) != {str} or set(map(type, logs.values())) != {float}):
        raise refusal(field, "score", "has extra logs that are not numbers by name")
    if not all(map(math.isfinite, (reward, value, *logs.values()))):
        raise refusal(field, "score", "has a value that is not finite")


def _check_lengths(header: Header) -> None:
    """Check that the turns of each sample add up to its response, and its version spans to its generated tokens."""
    turns = zip(
        split(header.generated_tokens, header.num_turns),
        split(header.environment_tokens, header.num_turns),
        split(header.stop_reasons, header.num_turns),
        split(header.span_lengths, header.num_versions),
        header.response_lengths,
        strict=True,
    )
    for i, (generated, environment, stop_reasons, spans, num_response) in enumerate(turns):
        field, num_generated = f"samples[{i}]", sum(generated)
        if not generated:
            raise refusal(field, "turns", "are missing")
        if num_generated + sum(environment) != num_response:
            raise refusal(field, "turns", f"do not tile the response of {num_response} tokens")
        if unknown := [reason for reason in stop_reasons if reason not in STOP_REASONS]:
            raise refusal(field, "turns", f"has the unknown stop reason {unknown[0]!r:.40}")
        if not spans or min(spans) < 1:
            raise refusal(field, "versions", "are missing or empty")
        if sum(spans) != num_generated:
            raise refusal(field, "versions", f"tile {sum(spans)} of {num_generated} generated tokens")


def split(items: Any, lengths: Sequence[int]) -> list[Any]:
    """Return ``items``, a list or an array, cut into pieces of these lengths.

    >>> split([7, 8, 9], [1, 2])
    [[7], [8, 9]]
    """
    pieces, start = [], 0
    for length in lengths:
        pieces.append(items[start : start + length])
        start += length
    return pieces


def refusal(place: str, name: str, problem: str) -> InvalidArgumentError:
    """Return the error for the field ``place.name``. ``problem`` is a clause: "is missing"."""
    return InvalidArgumentError(f"{place}.{name} {problem}", f"{place}.{name}")
