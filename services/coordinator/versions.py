"""The versions of the run: the version that serves, and how each publish ended. In memory and without I/O."""

from __future__ import annotations

from dataclasses import dataclass, field

from rollmesh.errors import SupersededError
from rollmesh.types import PolicyVersion, PublishOutcome, WeightEpoch

EpochMember = tuple[str, str, int]
"""Name, incarnation and number of processes of one rollout worker in a weight epoch."""


@dataclass
class VersionBook:
    """The committed version, the outcome of each publish, and the current weight epoch.

    A weight epoch is one membership of the process group. The next publish uses the same epoch if its members and its
    store are the same and every transfer over it ended well. Otherwise that publish gets an epoch with a new number.

    Attributes:
        last_epoch: the largest number of an epoch so far. A coordinator that starts again has to begin above all
            numbers of the coordinator before.
    """

    committed: PolicyVersion | None = None
    epoch: WeightEpoch | None = None
    outcomes: dict[PolicyVersion, PublishOutcome] = field(default_factory=dict)
    last_epoch: int = 0
    _members: tuple[EpochMember, ...] = ()
    _is_sound: bool = False

    def check_new(self, version: PolicyVersion) -> None:
        """Raises SupersededError if the version is older than the committed version.

        The committed version may be published again: a worker that joined meanwhile lacks the version.
        """
        if self.committed is not None and version < self.committed:
            raise SupersededError(f"version {version} cannot be published: version {self.committed} serves")

    def epoch_for(self, members: tuple[EpochMember, ...], store_host: str, store_port: int) -> WeightEpoch:
        """The current epoch if it is sound and ``members`` are its members, otherwise a new one.

        The learner is rank 0 of each epoch.
        """
        world_size = 1 + sum(num_ranks for _, _, num_ranks in members)
        wanted = WeightEpoch(self.last_epoch, store_host, store_port, world_size)
        if not self._is_sound or self._members != members or self.epoch != wanted:
            self.last_epoch += 1
            wanted = WeightEpoch(self.last_epoch, store_host, store_port, world_size)
        self.epoch, self._members, self._is_sound = wanted, members, True
        return wanted

    def break_epoch(self) -> None:
        """Make the next publish use a new epoch: a preparation or transfer failed, and members may be out of step."""
        self._is_sound = False

    def close(self, version: PolicyVersion, outcome: PublishOutcome) -> None:
        """Record how a publish ended. Forget the outcomes of versions before the committed version."""
        self.outcomes[version] = outcome
        if outcome.is_committed:
            self.committed = version
            self.outcomes = {known: how for known, how in self.outcomes.items() if known >= version}
