"""The names of everything a run keeps in Redis. Nobody else spells a key."""

from __future__ import annotations

from functools import cached_property

from rollmesh.types import GroupState


class Keys:
    """The keys of one run.

    All begin with ``rollmesh:{<run id>}:``; the braces are a hash tag, so that a cluster keeps a run on one node and
    scripts may touch all of its keys.

    Attributes:
        prefix: of all keys.
        row_prefix: a group's row is the hash at this prefix followed by the group's id (fields: see `rows`).
        slots: zset of the groups that hold a slot, scored by the step that trained them, ``+inf`` before.
        deadlines: zset of leased groups by the end of their lease, Unix milliseconds of the Redis clock.
        holders: zset of ``<member>\\0<group id>``, all of score 0: the leases of a member, by lexical range.
        line: zset of the groups that have a row, scored by their place in the line.
        meta: hash: ``opened`` (groups opened in the run), ``token`` (last fencing token), ``closed``, ``batch_size``
            (groups that the learner waits for), ``taken_step`` and ``retired_step`` (the highest of each),
            ``last_step`` (the step of the last batch), ``num_steps`` (steps trained), ``payloads_gone_step`` (the
            highest step of a group that retired), ``learner_term`` (how many learners took the queue over),
            ``newest_version`` and ``newest_step`` (the newest version that may serve, and the step that made it).
        requests: hash of each member's last lease request, to answer a repeated one.
        journal: stream with one entry per transition, long enough for all transitions of groups that hold a slot.
        ended: list of the groups that ended and still have a row, the oldest first.
        totals: hash of what is known of ended groups without a row: their number for each state, ``retried``,
            ``sequence_sum``.
        reasons: hash of ``<state>\\0<reason>`` of ended groups without a row: how many have it.
        wake: list of at most one element, which the learner pops when it has to look again.
        identity: hash: whose keys these are (see `identity`): ``id``, ``fingerprint``, ``created_s``, ``state``.
        owner: string that ends by itself unless the process that drives the run renews it (see `claim`).
    """

    def __init__(self, run_id: str) -> None:
        prefix = f"rollmesh:{{{run_id}}}:"
        self.prefix = prefix
        self.row_prefix = f"{prefix}row:"
        self.slots = f"{prefix}slots"
        self.deadlines = f"{prefix}deadlines"
        self.holders = f"{prefix}holders"
        self.line = f"{prefix}line"
        self.meta = f"{prefix}meta"
        self.requests = f"{prefix}requests"
        self.journal = f"{prefix}journal"
        self.wake = f"{prefix}wake"
        self.ended = f"{prefix}ended"
        self.totals = f"{prefix}totals"
        self.reasons = f"{prefix}reasons"
        self.identity = f"{prefix}identity"
        self.owner = f"{prefix}owner"

    def index(self, state: GroupState) -> str:
        """The zset of the groups in ``state``: by sequence until they are in a batch, by step from then on."""
        return f"{self.prefix}in:{state.value}"

    def row(self, group_id: str) -> str:
        return self.row_prefix + group_id

    def payload(self, group_id: str, fencing_token: int) -> str:
        """The msgpack payload that the holder of this lease committed. Leases never share one, so that a fenced
        commit cannot touch what another stored."""
        return f"{self.prefix}payload:{group_id}:{fencing_token}"

    @property
    def batch_prefix(self) -> str:
        return f"{self.prefix}batch:"

    def batch(self, step: int) -> str:
        """The list of the groups that a step took, until they are retired."""
        return f"{self.batch_prefix}{step}"

    @cached_property
    def for_scripts(self) -> tuple[str, ...]:
        """What every script gets as KEYS, in the order in which ``prelude.lua`` names them."""
        indexes = tuple(self.index(state) for state in GroupState)
        return (
            *indexes,
            self.slots,
            self.deadlines,
            self.holders,
            self.line,
            self.meta,
            self.requests,
            self.journal,
            self.wake,
            self.ended,
            self.totals,
            self.reasons,
            self.identity,
            self.owner,
        )
