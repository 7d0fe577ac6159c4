"""The deal of the tensors of the policy's average to the ranks."""

from rollmesh.types import TensorSpec
from services.learner.ema import deal

TENSORS = [TensorSpec(f"t{size}", "float32", (size,)) for size in (1, 50, 20, 30, 100, 49)]


def test_tensors_are_dealt_once_and_evenly() -> None:
    owners = deal(TENSORS, 2)
    loads = [sum(spec.shape[0] for spec in TENSORS if owners[spec.name] == rank) for rank in range(2)]
    assert set(owners) == {spec.name for spec in TENSORS}
    assert sorted(loads) == [121, 129]


def test_every_rank_deals_alike_whatever_the_order() -> None:
    assert deal(TENSORS, 3) == deal(TENSORS[::-1], 3)


def test_ranks_may_outnumber_tensors() -> None:
    assert len(set(deal(TENSORS[:2], 4).values())) == 2
