"""The staleness window against a model of the line: its bound is never exceeded, and it is reached."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from rollmesh.replay.staleness import StalenessWindow


@dataclass
class Mesh:
    """Slots, line, leases and learner as `StalenessWindow` describes them, without anything else.

    Attributes:
        working: the oldest version in each group that is being worked on, by place in the line.
        ready: the same of groups that wait for the learner.
        holding: for each slot the step that trained its group; None before.
        version: the learner's version, which is committed at once.
    """

    window: StalenessWindow
    working: dict[int, int] = field(default_factory=dict)
    ready: dict[int, int] = field(default_factory=dict)
    holding: dict[int, int | None] = field(default_factory=dict)
    version: int = 0
    num_opened: int = 0
    max_staleness: int = 0

    def open_and_lease(self) -> None:
        """Each free slot takes a group, which goes to the worker that is as far behind as it may be."""
        while len(self.holding) < self.window.num_slots:
            self.holding[self.num_opened] = None
            self.working[self.num_opened] = max(0, self.version - self.window.max_version_lag)
            self.num_opened += 1

    def finish(self, place: int) -> None:
        self.ready[place] = self.working.pop(place)

    def train(self) -> bool:
        """One step, where the window allows a whole batch."""
        left, batch = sorted({**self.working, **self.ready}), []
        while len(batch) < self.window.groups_per_batch:
            allowed = [place for place in left if place in self.ready and place < left[0] + self.window.size]
            if not allowed:
                return False
            batch.append(allowed[0])
            left.remove(allowed[0])
        self.max_staleness = max(self.max_staleness, *(self.version - self.ready.pop(place) for place in batch))
        self.version += 1
        for place in batch:
            del self.holding[place]
        return True


SETTINGS = [
    StalenessWindow(eta, slots, batch, lag)
    for batch in (1, 2, 5)
    for eta in (0, 1, 2, 4)
    for lag in (0, 2)
    for slots in sorted({batch, (eta + 1) * batch, max(batch, (eta + 1) * batch - batch // 2)})
]


@pytest.mark.parametrize("window", SETTINGS, ids=str)
def test_no_schedule_exceeds_the_bound(window: StalenessWindow) -> None:
    chance, mesh = random.Random(str(window)), Mesh(window)
    stubbornness = 0.0
    for number in range(600):
        if number % 60 == 0:
            stubbornness = chance.choice([0.0, 0.9, 0.99])  # how long the oldest group stays a straggler
        mesh.open_and_lease()
        places = sorted(mesh.working)
        if len(places) > 1 and chance.random() < stubbornness:
            places = places[1:]
        if places:
            mesh.finish(chance.choice(places))
        while chance.random() < 0.8 and mesh.train():
            pass
    assert mesh.version > 20
    assert mesh.max_staleness <= window.bound


@pytest.mark.parametrize("window", SETTINGS, ids=str)
def test_a_schedule_reaches_the_bound(window: StalenessWindow) -> None:
    mesh = Mesh(window)
    while mesh.version < window.max_version_lag + 1:  # so that a worker can be behind by all that it may
        mesh.open_and_lease()
        mesh.finish(min(mesh.working))
        mesh.train()
    mesh.open_and_lease()
    straggler = mesh.num_opened - 1
    while mesh.working.keys() != {straggler} or mesh.train():
        mesh.open_and_lease()
        for place in sorted(mesh.working):
            if place != straggler:
                mesh.finish(place)
    mesh.finish(straggler)
    assert mesh.train()
    assert mesh.max_staleness == window.bound


def test_synchronous_training_keeps_the_order_and_trains_on_policy() -> None:
    window = StalenessWindow(0, 32, 32)
    assert (window.size, window.bound) == (1, 0)


@pytest.mark.parametrize("eta", [1, 2, 4, 9])
@pytest.mark.parametrize("place", [0, 17, 31])
def test_one_straggler_does_not_stop_the_learner_wherever_it_stands(eta: int, place: int) -> None:
    window = StalenessWindow(eta, (eta + 1) * 32, 32)
    mesh = Mesh(window)
    mesh.open_and_lease()
    for other in sorted(mesh.working.keys() - {place}):
        mesh.finish(other)
    assert mesh.train(), "a whole batch is trained beside the straggler"
    mesh.open_and_lease()
    assert len(mesh.working) == 1 + 32, "and generation goes on"


@pytest.mark.parametrize("settings", [(-1, 1, 1, 0), (1, 1, 0, 0), (1, 3, 4, 0), (1, 9, 4, 0), (1, 8, 4, -1)])
def test_settings_without_a_bound_are_refused(settings: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="StalenessWindow"):
        StalenessWindow(*settings)
