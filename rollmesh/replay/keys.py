"""The names of all keys that a run has in Redis. No other module spells a key."""

from __future__ import annotations

from functools import cached_property

from rollmesh.types import GroupState


class Keys:
    """The keys of one run.

    All keys begin with ``rollmesh:{<run id>}:``. The braces are a hash tag: a cluster keeps all keys of a run on one
    node, so that a script may touch all of them.

    Attributes:
        prefix: the beginning of all keys.
        row_prefix: followed by a group's id, the key of the group's row, a hash (its fields: see `rows`).
        slots: zset of the groups that hold a slot, scored by the step that trained the group, or ``+inf`` before.
        deadlines: zset of leased groups, scored by the end of the lease in Unix milliseconds of the Redis clock.
        holders: zset of ``<member>\\0<group id>``, one entry per lease, all of score 0. A lexical range gives the
            leases of one member.
        line: zset of the groups that have a row, scored by their place in the line.
        meta: hash: ``opened`` (groups opened in the run), ``token`` (last fencing token), ``closed``, ``batch_size``
            (groups that the learner waits for), ``taken_step`` and ``retired_step`` (the highest step whose batch was
            taken, and whose groups are all retired),
            ``last_step`` (the step of the last batch), ``num_steps`` (steps trained), ``payloads_gone_step`` (the
            highest step of a group that retired), ``learner_term`` (how many learners took the queue over),
            ``coordinator_term`` (how many coordinators took the run),
            ``newest_version`` and ``newest_step`` (the newest version that may serve, and the step that made it).
        requests: hash of each member's last lease request, so that a repeated request gets the first answer.
        journal: stream with one entry per transition. It keeps at least all transitions of groups that hold a slot.
        ended: list of the groups that ended and still have a row, the oldest first.
        totals: hash about the ended groups without a row: their number for each state, ``retried`` (how many took more
            than one attempt), ``sequence_sum`` (the sum of their places in the line).
        reasons: hash from ``<state>\\0<reason>`` to the number of ended groups without a row that have this reason.
        wake: list of at most one element. An element wakes the learner, which pops the element and looks again.
        identity: hash that says whose keys these are (see `identity`): ``id``, ``fingerprint``, ``created_s``,
            ``state``.
        owner: the term of the coordinator that drives the run, with a time to live that it renews (see `claim`).
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
        """Return the key of the zset of the groups in ``state``.

        The score is the group's place in the line, and the step once the group is in a batch.
        """
        return f"{self.prefix}in:{state.value}"

    def row(self, group_id: str) -> str:
        return self.row_prefix + group_id

    def payload(self, group_id: str, fencing_token: int) -> str:
        """Return the key of the msgpack payload that the holder of one lease commits.

        Each lease has a key of its own, so that a fenced commit cannot touch the payload of another lease.
        """
        return f"{self.prefix}payload:{group_id}:{fencing_token}"

    @property
    def batch_prefix(self) -> str:
        return f"{self.prefix}batch:"

    def batch(self, step: int) -> str:
        """Return the key of the list of groups in the batch of a step. The list goes when the groups are retired."""
        return f"{self.batch_prefix}{step}"

    @cached_property
    def for_scripts(self) -> tuple[str, ...]:
        """The KEYS of every script, in the order in which ``prelude.lua`` names them."""
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
