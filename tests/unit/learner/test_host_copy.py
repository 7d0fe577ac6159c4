"""Copies of training state: training goes on, and the copies stay as they are."""

from __future__ import annotations

import io
from collections import OrderedDict

import torch

from services.learner.host_copy import copy_to_host


def test_a_copy_stays_as_it_was_at_every_depth() -> None:
    groups = [{"lr": 0.1, "params": [0]}]
    state = {"module": OrderedDict(weight=torch.ones(3)), "optimizer": {"exp_avg": (torch.ones(2),), "groups": groups}}
    state["module"]._metadata = {"version": 2}
    copied = copy_to_host(state)
    state["module"]["weight"].zero_()
    state["optimizer"]["exp_avg"][0].zero_()
    groups[0]["lr"] = 0.2
    assert copied["module"]["weight"].tolist() == [1, 1, 1]
    assert copied["module"]._metadata == {"version": 2}
    assert copied["optimizer"]["exp_avg"][0].tolist() == [1, 1]
    assert copied["optimizer"]["groups"][0]["lr"] == 0.1


def test_tied_weights_are_copied_once_and_a_view_without_its_buffer() -> None:
    buffer = torch.arange(1000.0)
    tied = buffer[:10].view(2, 5)
    copied = copy_to_host({"embed": tied, "head": buffer[:10].view(2, 5), "other": buffer[10:20].view(2, 5)})
    assert copied["embed"] is copied["head"]
    assert copied["embed"].untyped_storage().nbytes() == 40
    assert copied["other"].tolist() == buffer[10:20].view(2, 5).tolist()


def test_a_parameter_and_a_tensor_without_elements_are_copied() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    copied = copy_to_host([parameter, torch.empty(0), torch.empty(0, dtype=torch.int64), torch.tensor(3)])
    with torch.no_grad():
        parameter.zero_()
    assert copied[0].tolist() == [1, 1]
    assert not copied[0].requires_grad
    assert (copied[1].dtype, copied[2].dtype, copied[3].item()) == (torch.float32, torch.int64, 3)
    torch.save(copied, io.BytesIO())
