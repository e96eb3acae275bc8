"""Two functions in lockstep: who shares a message with whom, what the second thread knows, and how failures end."""

import contextvars
import threading
import traceback
from collections import Counter
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from crossbatch.models import MoCo
from crossbatch.models.collective import Collective, GroupCollective
from crossbatch.models.lockstep import LockstepCollective, in_lockstep


class Twice(Collective):
    """Two ranks that hold the same, and a count of the elements in every message."""

    def __init__(self):
        self.messages: list[int] = []

    @property
    def world_size(self) -> int:
        return 2

    def all_gather(self, tensor):
        self.messages.append(tensor.numel())
        return torch.stack((tensor, tensor))


def gathers(collective, *tensors):
    """A function that gathers one tensor after the other, as the norms of a network do."""
    return lambda: [collective.all_gather(tensor) for tensor in tensors]


def some(count: int, first: int = 1) -> list[torch.Tensor]:
    return [torch.randn(2, size) for size in range(first, first + count)]


@pytest.mark.parametrize(
    ("ours", "theirs", "messages"),
    [
        (some(3), some(3), [4, 8, 12]),
        (some(3), some(3, 5), [12, 16, 20]),  # of other shapes: each gets its own back
        (some(3), some(1), [4, 4, 6]),
        (some(1), some(3), [4, 4, 6]),
        (some(0), some(2), [2, 4]),
        (some(2), some(0), [2, 4]),
        (some(1), [torch.randn(2, 3).double()], [2, 6]),  # of another dtype: alone
    ],
)
def test_gathers_meet_and_what_has_no_partner_goes_alone(ours, theirs, messages):
    both = Twice()
    first, second = in_lockstep(*(gathers(LockstepCollective(both), *tensors) for tensors in (ours, theirs)))
    for given, got in ((ours, first), (theirs, second)):
        assert len(got) == len(given)
        for tensor, gathered in zip(given, got, strict=True):
            assert gathered.equal(torch.stack((tensor, tensor))) and gathered.is_contiguous()
    assert both.messages == messages


def test_gathers_among_other_ranks_do_not_meet():
    one, other = Twice(), Twice()
    in_lockstep(gathers(LockstepCollective(one), *some(2)), gathers(LockstepCollective(other), *some(2)))
    assert one.messages == other.messages == [2, 4]


def test_outside_of_lockstep_a_gather_goes_alone():
    both = Twice()
    in_lockstep(gathers(LockstepCollective(both)), gathers(LockstepCollective(both)))
    gathers(LockstepCollective(both), *some(2))()
    assert both.messages == [2, 4]


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_the_second_function_runs_as_if_it_were_called_here():
    """Autocast, modes and context variables are those of the caller; it moves only while the first waits."""
    both, told, variable = LockstepCollective(Twice()), [], contextvars.ContextVar("variable", default=0)
    saved: list[int] = []

    def function(name):
        def run():
            weight = nn.Parameter(torch.eye(4))
            for turn in range(2):
                told.append((name, turn))
                product = weight @ weight
                both.all_gather(product)
            return product.dtype, product.requires_grad, variable.get(), threading.get_ident()

        return run

    variable.set(3)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(1) or t, lambda t: t)
    with torch.autocast("cpu", torch.bfloat16), Counting() as counting, hooks:
        first, second = in_lockstep(function("first"), function("second"))
    assert first[:3] == (torch.bfloat16, True, 3) and second[:3] == (torch.bfloat16, False, 3)
    assert first[3] != second[3]
    assert told == [("first", 0), ("second", 0), ("first", 1), ("second", 1)]
    assert counting.calls["aten.mm.default"] == 4 and counting.calls["aten.cat.default"] == 2
    assert saved  # of the first, which has a graph
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    with torch.device("meta"):
        assert [x.device.type for x in in_lockstep(lambda: both.all_gather(torch.ones(2)), lambda: torch.ones(2))] == [
            "meta"
        ] * 2


def test_the_second_function_makes_tensors_without_memory_where_the_first_does():
    both = LockstepCollective(Twice())
    with FakeTensorMode():
        first, second = in_lockstep(*[lambda: both.all_gather(torch.randn(2, 3))] * 2)
    assert type(first).__name__ == type(second).__name__ == "FakeTensor" and second.shape == (2, 2, 3)


def test_the_second_function_uses_the_stream_of_the_first(monkeypatch):
    both, used = LockstepCollective(Twice()), []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: f"stream of {threading.get_ident()}")
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: used.append((stream, threading.get_ident())))
    _, ident = in_lockstep(lambda: both.all_gather(torch.ones(1)), threading.get_ident)
    assert used == [(f"stream of {threading.get_ident()}", ident)]


def fails_in_the_second(both):
    both.all_gather(torch.ones(1))
    raise KeyError("the second failed")


def fails_in_the_first(both, at: int):
    for _ in range(at):
        both.all_gather(torch.ones(1))
    raise KeyboardInterrupt


def test_a_failure_of_either_side_reaches_the_caller_and_ends_the_other():
    both, running = LockstepCollective(Twice()), threading.active_count()
    with pytest.raises(KeyError, match="the second failed") as failed:
        in_lockstep(gathers(both, *some(5)), lambda: fails_in_the_second(both))
    assert "fails_in_the_second" in "".join(traceback.format_tb(failed.value.__traceback__))
    assert threading.active_count() == running
    for at in (0, 1, 3):
        ended: list[bool] = []

        def second(ended=ended):
            try:
                gathers(both, *some(5))()
            finally:
                ended.append(True)

        with pytest.raises(KeyboardInterrupt):
            in_lockstep(lambda at=at: fails_in_the_first(both, at), second)
        assert threading.active_count() == running and ended == [True] * (at > 0)
    in_lockstep(gathers(both, *some(1)), gathers(both, *some(1)))


class Small(nn.Module):
    """Stand in for somebody else's backbone; with `dropout` it draws random numbers."""

    num_features = 6

    def __init__(self, dropout: float):
        super().__init__()
        layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(dropout), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, images):
        return self.body(images)


def messages_of_steps(dropout: float) -> list[int]:
    """On this rank: the gathers of three steps of a backbone of one's own."""
    torch.manual_seed(0)
    model, counts = MoCo(Small(dropout), projection_dim=8, mlp_dim=16), []
    with mock.patch.object(
        GroupCollective, "all_gather", autospec=True, side_effect=GroupCollective.all_gather
    ) as gather:
        for step in range(3):
            model.loss(torch.randn(2 * 4, 3, 9, 9), step, 0).loss.backward()
            counts.append(gather.call_count - sum(counts))
    return counts


def test_a_backbone_that_draws_random_numbers_runs_alone(pools):
    """Two norms in a backbone, two in a projector, one in the predictor, and the keys. The first pass finds out."""
    assert pools(2).run(messages_of_steps, 0.0) == [[4 + 2 + 1 + 1, 2 + 2 + 1 + 1, 2 + 2 + 1 + 1]] * 2
    assert pools(2).run(messages_of_steps, 0.5) == [[4 + 2 + 1 + 1] * 3] * 2
