"""One row of the ledger: its fields, and how a row is read from Redis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rollmesh.errors import ReplayError
from rollmesh.types import GroupState, PolicyVersion, PromptId


@dataclass(frozen=True, slots=True)
class GroupRow:
    """All that the ledger knows of one group.

    Attributes:
        group_id: ``str(prompt_id)``.
        sequence: place in the line, from 0, dense in the order of opening.
        attempt: number of leases of this group that ended without a commit. While the group is leased for the first
            time, this is 0.
        fencing_token: token of the latest lease; 0 before the first lease. Tokens only grow, over the whole run.
        member: name of the member that holds or held the latest lease; empty before the first lease.
        reason: why the latest attempt failed, or why the group is FILTERED; empty if nothing went wrong.
        num_samples: samples of the committed group; 0 before the commit.
        num_tokens: prompt and response tokens of the committed group; 0 before the commit.
        oldest_version: the oldest version that generated a token of the committed group; None before the commit.
        step: the step whose batch holds the group; None before.
    """

    group_id: str
    prompt_id: PromptId
    sequence: int
    state: GroupState
    attempt: int
    fencing_token: int
    member: str
    reason: str
    num_samples: int
    num_tokens: int
    oldest_version: PolicyVersion | None
    step: int | None


def parse_prompt_id(group_id: str) -> PromptId:
    """Return the prompt id that ``str`` turned into this text: "train:0:7" gives ``PromptId("train", 0, 7)``.

    Raises:
        ValueError: the text is not that of a prompt id.
    """
    dataset, epoch, index = group_id.rsplit(":", 2)
    return PromptId(dataset, int(epoch), int(index))


def parse_row(reply: Sequence[bytes]) -> GroupRow:
    """Return the row of ``HGETALL``'s flat reply: field, value, field, value, and so on.

    Raises:
        ReplayError: a field is missing or has no possible value.
    """
    fields = {key.decode(): value.decode() for key, value in zip(reply[::2], reply[1::2], strict=True)}
    try:
        oldest_version, step = fields.get("oldest_version"), fields.get("step")
        return GroupRow(
            group_id=fields["id"],
            prompt_id=parse_prompt_id(fields["id"]),
            sequence=int(fields["sequence"]),
            state=GroupState(fields["state"]),
            attempt=int(fields["attempt"]),
            fencing_token=int(fields["token"]),
            member=fields.get("member", ""),
            reason=fields.get("reason", ""),
            num_samples=int(fields.get("num_samples", 0)),
            num_tokens=int(fields.get("num_tokens", 0)),
            oldest_version=PolicyVersion.parse(oldest_version) if oldest_version else None,
            step=int(step) if step else None,
        )
    except (KeyError, ValueError) as error:
        raise ReplayError(f"row of group {fields.get('id', '?')!r} is damaged: {error!r} in {fields}") from error
