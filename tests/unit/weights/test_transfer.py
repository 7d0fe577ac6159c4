"""Sender, receiver and group together, over loopback: every failure ends in time and by name."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rollmesh.errors import ConfigError, DeadlineError, WeightTransferError
from rollmesh.types import TensorSpec, WeightEpoch, WeightPlan
from rollmesh.weights.group import RendezvousStore, WeightGroup
from rollmesh.weights.inbox import WeightInbox
from rollmesh.weights.plan import bucket_num_bytes, build_plan, num_buckets, num_bytes
from rollmesh.weights.receiver import Received, WeightReceiver
from rollmesh.weights.sender import send
from tests.fakes.listeners import listeners

PLAN = build_plan([TensorSpec(f"w{i}", "float32", (1000,)) for i in range(10)], 9000)


@pytest.fixture(scope="module")
def store() -> RendezvousStore:
    return RendezvousStore.host("127.0.0.1", 0)


@pytest.fixture
def epochs(store: RendezvousStore) -> Callable[[int], WeightEpoch]:
    return lambda world_size: WeightEpoch(time.monotonic_ns(), "127.0.0.1", store.port, world_size)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def join_all(pool: ThreadPoolExecutor, epoch: WeightEpoch, timeout_s: float = 20) -> list[WeightGroup]:
    joining = [pool.submit(WeightGroup.join, epoch, rank, timeout_s) for rank in range(epoch.world_size)]
    return [future.result(timeout_s + 5) for future in joining]


def buckets(plan: WeightPlan = PLAN, seed: int = 0) -> Iterator[torch.Tensor]:
    """Reuses one buffer, as the learner does."""
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.empty(max(bucket_num_bytes(plan, i) for i in range(num_buckets(plan))), dtype=torch.uint8)
    for index in range(num_buckets(plan)):
        bucket = buffer[: bucket_num_bytes(plan, index)]
        bucket.copy_(torch.randint(0, 256, bucket.shape, generator=generator, dtype=torch.uint8))
        yield bucket


def poll_to_end(inbox: WeightInbox, timeout_s: float = 20) -> Received:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if (received := inbox.poll()) is not None:
            return received
        time.sleep(0.005)
    raise AssertionError("the inbox did not come to an end")


def test_all_receivers_get_the_senders_bytes_and_digest(epochs, pool) -> None:
    groups = join_all(pool, epochs(3))
    receivers = [WeightReceiver(), WeightReceiver()]
    for seed in range(3):
        transfers = [pool.submit(r.receive, g, PLAN, 10) for r, g in zip(receivers, groups[1:], strict=True)]
        digest = send(groups[0], PLAN, buckets(seed=seed), 10)
        expected = [bucket.clone() for bucket in buckets(seed=seed)]
        for receiver, transfer in zip(receivers, transfers, strict=True):
            received = transfer.result(10)
            assert received.digest == digest
            assert received.num_bytes == num_bytes(PLAN)
            flat = torch.cat([tensor.contiguous().view(torch.uint8) for _, tensor in receiver.tensors()])
            assert torch.equal(flat, torch.cat(expected))
    for group in groups:
        group.close()


def test_buffers_are_reused_from_transfer_to_transfer(epochs, pool) -> None:
    groups = join_all(pool, epochs(2))
    receiver = WeightReceiver()
    addresses = []
    for seed in range(2):
        transfer = pool.submit(receiver.receive, groups[1], PLAN, 10)
        send(groups[0], PLAN, buckets(seed=seed), 10)
        transfer.result(10)
        addresses.append([tensor.data_ptr() for _, tensor in receiver.tensors()])
    assert addresses[0] == addresses[1]
    for group in groups:
        group.close()


def test_joining_ends_at_its_deadline_when_a_member_never_comes(epochs) -> None:
    started = time.monotonic()
    with pytest.raises(DeadlineError, match="not all 2 members"):
        WeightGroup.join(epochs(2), 0, 1.0)
    assert time.monotonic() - started < 15


def test_joining_fails_by_name_when_there_is_no_store() -> None:
    with pytest.raises(WeightTransferError, match="cannot be reached"):
        WeightGroup.join(WeightEpoch(1, "127.0.0.1", 1, 2), 1, 1.0)


def test_a_port_in_use_is_the_configurations_fault(store: RendezvousStore) -> None:
    with pytest.raises(ConfigError, match=r"weights\.store_port"):
        RendezvousStore.host("127.0.0.1", store.port)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost"])
def test_the_store_listens_on_the_address_that_it_was_given_and_closes_it(host: str) -> None:
    before = set(listeners([os.getpid()]))
    store = RendezvousStore.host(host)
    (opened,) = set(listeners([os.getpid()])) - before
    assert opened.port == store.port
    assert opened.is_loopback
    assert RendezvousStore.connect(host, store.port, 5.0).store.add("reached", 1) == 1
    del store
    assert set(listeners([os.getpid()])) <= before


def test_a_group_listens_on_the_interface_of_the_store_alone(epochs, pool) -> None:
    before = set(listeners([os.getpid()]))
    groups = join_all(pool, epochs(2))
    opened = set(listeners([os.getpid()])) - before
    assert len(opened) == 2
    assert all(listener.address == "127.0.0.1" for listener in opened)
    for group in groups:
        group.close()


def test_a_silent_sender_costs_the_receiver_its_deadline_and_no_more(epochs, pool) -> None:
    groups = join_all(pool, epochs(2))
    started = time.monotonic()
    with pytest.raises(DeadlineError):
        WeightReceiver().receive(groups[1], PLAN, 1.0)
    groups[1].close()
    assert time.monotonic() - started < 12
    groups[0].close()


def test_closing_the_group_frees_a_waiting_thread_at_once(epochs, pool) -> None:
    groups = join_all(pool, epochs(2))
    transfer = pool.submit(WeightReceiver().receive, groups[1], PLAN, 60)
    time.sleep(0.3)
    assert not transfer.done()
    started = time.monotonic()
    groups[1].close()
    with pytest.raises(WeightTransferError, match="closed"):
        transfer.result(30)
    assert time.monotonic() - started < 30
    groups[0].close()


def test_members_meet_again_in_the_same_epoch_after_all_have_left(epochs, pool) -> None:
    epoch = epochs(2)
    for seed in range(3):
        groups = join_all(pool, epoch)
        receiver = WeightReceiver()
        transfer = pool.submit(receiver.receive, groups[1], PLAN, 10)
        assert send(groups[0], PLAN, buckets(seed=seed), 10) == transfer.result(10).digest
        for group in groups:
            group.close()


def test_buckets_that_are_not_the_plans_are_not_sent(epochs, pool) -> None:
    groups = join_all(pool, epochs(2))
    with pytest.raises(WeightTransferError, match="bucket 0 is"):
        send(groups[0], PLAN, iter([torch.zeros(3, dtype=torch.uint8)]), 5)
    with pytest.raises(WeightTransferError, match="0 buckets were given"):
        send(groups[0], PLAN, iter([]), 5)
    for group in groups:
        group.close()


def _member_that_dies(epoch: WeightEpoch, rank: int) -> None:
    group = WeightGroup.join(epoch, rank, 120)
    if rank == 0:
        group.broadcast(torch.zeros(bucket_num_bytes(PLAN, 0), dtype=torch.uint8), 10)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def group_with_dying_peer(epochs, request: pytest.FixtureRequest) -> Iterator[WeightGroup]:
    """This process' end of a group of two, whose other rank is killed as soon as the group stands."""
    epoch = epochs(2)
    process = multiprocessing.get_context("spawn").Process(target=_member_that_dies, args=(epoch, request.param))
    process.start()
    try:
        group = WeightGroup.join(epoch, 1 - request.param, 120)  # a process that imports torch has to come
        yield group
        group.close()
    finally:
        process.join(20)


@pytest.mark.parametrize("group_with_dying_peer", [0], indirect=True)
def test_a_killed_sender_is_noticed_before_the_deadline(group_with_dying_peer: WeightGroup) -> None:
    started = time.monotonic()
    with pytest.raises(WeightTransferError):
        WeightReceiver().receive(group_with_dying_peer, PLAN, 20)
    assert time.monotonic() - started < 15


@pytest.mark.parametrize("group_with_dying_peer", [1], indirect=True)
def test_a_killed_receiver_is_noticed_before_the_deadline(group_with_dying_peer: WeightGroup) -> None:
    size = 50_000_000  # more than the sockets hold
    started = time.monotonic()
    with pytest.raises(WeightTransferError):
        send(
            group_with_dying_peer,
            build_plan([TensorSpec("w", "uint8", (size,))], size),
            iter([torch.zeros(size, dtype=torch.uint8)]),
            20,
        )
    assert time.monotonic() - started < 15


class SlowToStart:
    """A transport whose broadcasts take a moment to begin, and never end."""

    def __init__(self) -> None:
        self.is_starting, self.may_start = threading.Event(), threading.Event()
        self.ends: list[str] = []

    def broadcast(self, tensors: object, options: object) -> SlowToStart:
        self.is_starting.set()
        assert self.may_start.wait(20)
        return self

    def is_completed(self) -> bool:
        return False

    def abort(self) -> None:
        self.ends.append("abort")

    def shutdown(self) -> None:
        self.ends.append("shutdown")


def test_a_group_that_is_closed_while_a_broadcast_begins_aborts_it(pool) -> None:
    transport = SlowToStart()
    group = WeightGroup(transport, WeightEpoch(1, "127.0.0.1", 1, 2), 1)
    receiving = pool.submit(group.broadcast, torch.zeros(1), 20)
    assert transport.is_starting.wait(20)
    closing = pool.submit(group.close)
    transport.may_start.set()
    closing.result(20)
    with pytest.raises(WeightTransferError, match="closed during a broadcast"):
        receiving.result(20)
    assert transport.ends == ["abort"]  # a shutdown would wait for the broadcast until its deadline


class TestInbox:
    """`WeightInbox`: nothing waits, and nothing of an aborted transfer reaches the next."""

    def test_it_joins_and_receives_in_the_background(self, epochs, pool) -> None:
        epoch, inbox = epochs(2), WeightInbox()
        inbox.begin_join(epoch, 1, 20)
        inbox.begin_receive(PLAN, 20)
        assert inbox.poll() is None
        group = WeightGroup.join(epoch, 0, 20)
        for seed in range(2):
            if seed:
                inbox.begin_join(epoch, 1, 20)
                inbox.begin_receive(PLAN, 20)
            digest = send(group, PLAN, buckets(seed=seed), 10)
            assert poll_to_end(inbox).digest == digest
            assert len(dict(inbox.tensors(digest))) == 10
        with pytest.raises(WeightTransferError, match="not those"):
            inbox.tensors(b"another")
        inbox.abort()
        group.close()

    def test_a_failed_join_comes_out_of_poll(self, epochs) -> None:
        inbox = WeightInbox()
        inbox.begin_join(epochs(2), 1, 2.0)
        inbox.begin_receive(PLAN, 5)
        with pytest.raises(DeadlineError, match="not all"):
            poll_to_end(inbox)
        inbox.abort()

    def test_an_abort_leaves_at_once_and_the_next_transfer_works(self, epochs) -> None:
        epoch, inbox = epochs(2), WeightInbox()
        inbox.begin_join(epoch, 1, 20)
        inbox.begin_receive(PLAN, 20)
        group = WeightGroup.join(epoch, 0, 20)
        time.sleep(0.2)
        started = time.monotonic()
        inbox.abort()
        group.close()
        assert time.monotonic() - started < 15
        with pytest.raises(WeightTransferError):
            inbox.poll()
        inbox.begin_join(epoch, 1, 20)
        inbox.begin_receive(PLAN, 20)
        again = WeightGroup.join(epoch, 0, 20)
        digest = send(again, PLAN, buckets(seed=7), 10)
        assert poll_to_end(inbox).digest == digest
        inbox.abort()
        again.close()

    def test_receiving_without_a_group_is_refused(self) -> None:
        with pytest.raises(WeightTransferError, match="no weight group"):
            WeightInbox().begin_receive(PLAN, 5)

    def test_nobody_waits_for_a_join_that_was_aborted(self, epochs) -> None:
        inbox = WeightInbox()
        inbox.begin_join(epochs(2), 1, 1.0)
        inbox.abort()
        deadline = time.monotonic() + 30
        while any(thread.name.startswith("weights_") for thread in threading.enumerate()):
            assert time.monotonic() < deadline, "the thread of the aborted join lives on"
            time.sleep(0.05)
