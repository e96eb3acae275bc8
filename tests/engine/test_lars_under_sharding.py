"""What sharding does to LARS elsewhere and not here, and what our LARS costs in collectives."""

from unittest import mock

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from crossbatch.engine.optimizers import LARS
from tests.small_runs import LARS as LARS_CONFIG
from tests.small_runs import VIT, fsdp, losses, train, zero


class TorchStyleLARS(torch.optim.Optimizer):
    """MoCo v3's formula as everyone writes it: the parameter's number of dimensions decides who adapts."""

    def __init__(self, params, momentum: float, trust_coefficient: float):
        super().__init__(params, {"lr": 0.0, "momentum": momentum, "trust_coefficient": trust_coefficient})

    @torch.no_grad()
    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                d = p.grad
                if p.ndim > 1:
                    d = d + group["weight_decay"] * p
                    d = d * (group["trust_coefficient"] * p.norm() / d.norm() if p.norm() > 0 and d.norm() > 0 else 1.0)
                v = self.state[p].setdefault("mu", torch.zeros_like(p))
                v.mul_(group["momentum"]).add_(d)
                p.sub_(v, alpha=group["lr"])


def torch_style(groups, config):
    return TorchStyleLARS(groups, config.optimizer.params.momentum, config.optimizer.params.trust_coefficient)


def plain_sgd(groups, config):
    return torch.optim.SGD(
        [{**g, "weight_decay": 0.0} for g in groups], lr=0.0, momentum=config.optimizer.params.momentum
    )


def train_with(build_optimizer, overrides, out, steps):
    # Checkpoints are not of interest, and know only the optimizers that users can choose.
    with (
        mock.patch("crossbatch.engine.tasks.build.build_optimizer", build_optimizer),
        mock.patch.multiple(
            "crossbatch.engine.checkpoint.schedule.CheckpointSchedule", boundary=mock.DEFAULT, final=mock.DEFAULT
        ),
    ):
        train(overrides, out, steps)


@pytest.mark.long
def test_the_trap(tmp_path, pools):
    """DeepSpeed steps on flat, 1-D partitions: in a torch-style LARS nothing adapts and nothing decays."""
    lars = [*VIT, *LARS_CONFIG]
    runs = {
        "one process": (1, torch_style, zero(0)),
        "sgd": (1, plain_sgd, zero(0)),
        "ZeRO-1": (2, torch_style, zero(1)),
        "ZeRO-3": (2, torch_style, zero(3)),
    }
    found = {}
    for name, (ranks, build, backend) in runs.items():
        pools(ranks).run(train_with, build, [*lars, *backend], str(tmp_path / name), 4)
        found[name] = losses(tmp_path / name)
    pools(2).run(train, [*lars, *zero(1)], str(tmp_path / "ours"), 4)
    right = pytest.approx(found["one process"], rel=1e-5)
    assert losses(tmp_path / "ours") == right
    for name in ("ZeRO-1", "ZeRO-3"):
        assert found[name] != right
        assert found[name] == pytest.approx(found["sgd"], rel=1e-5)


def collectives(overrides: list[str], out: str) -> list[tuple[bool, int, int]]:
    """For every call of LARS.step in three training steps: does anything adapt, all-reduces, collectives."""
    calls = []
    original = LARS.step

    def counted(self, closure=None):
        with CommDebugMode() as mode:
            original(self, closure)
        adapts = any(group["adapts"] and group["params"] for group in self.param_groups)
        reduces = sum(
            n for op, n in mode.get_comm_counts().items() if "allreduce" in str(op) or "all_reduce" in str(op)
        )
        calls.append((adapts, reduces, mode.get_total_counts()))

    with mock.patch.object(LARS, "step", counted):
        train([*VIT, *LARS_CONFIG, *overrides], out, 3)
    return calls


@pytest.mark.parametrize(
    ("ranks", "backend", "adapting", "others"),
    [
        pytest.param(1, zero(1), 1, 1, marks=pytest.mark.slow),
        pytest.param(1, fsdp(3), 1, 0, marks=pytest.mark.slow),
        pytest.param(2, zero(0), 1, 0, marks=pytest.mark.slow),
        (2, zero(1), 1, 1),  # DeepSpeed steps group by group; the vectors need no norms
        pytest.param(2, zero(2), 1, 1, marks=pytest.mark.slow),
        (2, [*zero(3), "zero_optimization.sub_group_size=4000"], 3, 1),
        pytest.param(2, fsdp(1), 1, 0, marks=pytest.mark.slow),
        (2, fsdp(3), 1, 0),
    ],
)
def test_one_all_reduce_a_step(tmp_path, pools, ranks, backend, adapting, others):
    """One per optimizer step, one per sub-group of stage 3, none where a rank holds everything."""
    each = 0 if ranks == 1 or backend == zero(0) else 1
    for calls in pools(ranks).run(collectives, backend, str(tmp_path)):
        assert sorted(calls) == sorted([(True, each, each)] * 3 * adapting + [(False, 0, 0)] * 3 * others)


def order_of_a_step(overrides: list[str], out: str) -> list[str]:
    """What happens in `Backend.step`: LARS prepares, the host reads the norm, LARS steps."""
    from crossbatch.engine.sharding.fsdp import FsdpBackend
    from crossbatch.engine.sharding.zero import ZeroBackend

    events, inside = [], []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default and not inside:
                events.append("read")
            return func(*args, **(kwargs or {}))

    def logged(name):
        original = getattr(LARS, name)

        def call(self, *args):
            events.append(name)
            inside.append(name)  # the passes of a CPU read their sums
            original(self, *args)
            inside.pop()

        return mock.patch.object(LARS, name, call)

    def watched(backend):
        original = backend.step

        def step(self, scale):
            events.append("|")
            with Reads():
                return original(self, scale)

        return mock.patch.object(backend, "step", step)

    with logged("prepare"), logged("step"), watched(FsdpBackend), watched(ZeroBackend):
        train([*VIT, *LARS_CONFIG, *overrides], out, 2)
    return events


@pytest.mark.parametrize("backend", [zero(0), fsdp(0), fsdp(3)])
def test_lars_prepares_before_the_host_waits_for_the_norm(tmp_path, pools, backend):
    for events in pools(2).run(order_of_a_step, backend, str(tmp_path)):
        assert events == ["|", "prepare", "read", "step"] * 2
