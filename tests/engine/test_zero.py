"""What we ask of DeepSpeed's insides: one gradient norm, read once, and gathers that wait for what was written."""

import contextlib
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.small_runs import ADAMW, BASE, LARS, VIT, losses, pretrainer, run, train, zero

NUM_GRADIENTS = 180


class Operators(TorchDispatchMode):
    """Lists the operators that run, and those whose result the host waits for on a GPU."""

    def __init__(self):
        super().__init__()
        self.names, self.waits = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        inputs = [a for a in args if isinstance(a, torch.Tensor) and a.device.type == "cuda"]
        leaves_gpu = inputs and isinstance(result, torch.Tensor) and result.device.type == "cpu"
        if leaves_gpu or func is torch.ops.aten._local_scalar_dense.default:
            self.waits.append(str(func))
        return result


def test_the_norm_of_all_gradients_takes_few_operators_and_one_synchronisation():
    from crossbatch.engine.sharding.zero import group_norms

    with FakeTensorMode(), Operators() as seen:
        gradients = [torch.empty(10, device="cuda") for _ in range(NUM_GRADIENTS)]
        seen.names.clear()
        norms = group_norms([gradients[:60], gradients[60:]], torch.float32, lambda sums: sums)
        assert seen.waits == ["aten._to_copy.default"]
    assert [norm.device.type for norm in norms] == ["cpu", "cpu"]
    kernels = [
        name for name in seen.names if not any(view in name for view in ("split", "unbind", "select", "prim.device"))
    ]
    assert len(kernels) < 12, kernels  # 2 * 180 and more, one by one


def norms_both_ways(overrides: list[str], out: str) -> list[tuple[list, list]]:
    """For each of two steps: the norm that a step used and returned, and what DeepSpeed's own loops make of the gradients."""
    from crossbatch.engine.config import Device, load_config, resolve

    cfg = resolve(load_config(None, [*BASE, *VIT, *LARS, *overrides]), dist.get_world_size(), Device("cpu"))
    trainer = pretrainer(cfg, out, "none", 2)
    backend: Any = trainer.state.step.backend
    found = []
    optimizer, name = backend.optimizer, "_get_norm_groups" if backend.stage == 3 else "scaled_global_norm"
    ours = getattr(optimizer, name)
    assert name in vars(optimizer)  # else DeepSpeed's would be compared with itself

    def both():
        norms = ours()
        theirs = getattr(type(optimizer), name)(optimizer)
        found.append(([float(n) for n in norms], [float(n) for n in theirs]) if backend.stage == 3 else (norms, theirs))
        return norms

    with mock.patch.object(optimizer, name, both):
        trainer.train()
    return [([float(a)], [float(b)]) if torch.is_tensor(a) else (a, b) for a, b in found]


@pytest.mark.parametrize(
    "backend",
    [
        zero(1),
        *(
            pytest.param(one, marks=pytest.mark.slow)
            for one in (zero(2), [*zero(3), "zero_optimization.sub_group_size=4000"])
        ),
    ],
)
def test_the_norm_has_the_bits_of_deepspeed_s_own(tmp_path, pools, backend):
    for steps in pools(2).run(norms_both_ways, backend, str(tmp_path)):
        assert len(steps) == 2 and all(norm > 0 for ours, _ in steps for norm in ours)
        for ours, theirs in steps:
            assert ours == theirs


def events_of_stage_0(out: str) -> list[str]:
    """Say in which order LARS is prepared, makes its step, and the host waits for the norm, in one step without sharding."""
    from crossbatch.engine.config import Device, load_config, resolve
    from crossbatch.engine.optimizers import LARS as Optimizer

    cfg = resolve(load_config(None, [*BASE, *VIT, *LARS, *zero(0)]), dist.get_world_size(), Device("cpu"))
    trainer = pretrainer(cfg, out, "none", 1)
    events: list[str] = []

    class Norm:
        def __float__(self) -> float:
            events.append("wait")
            return 1.0

    def logged(method):
        def call(*args, **kwargs):
            events.append(method.__name__)
            return method(*args, **kwargs)

        return call

    with (
        mock.patch.object(torch.nn.utils, "get_total_norm", lambda gradients: Norm()),
        mock.patch.object(Optimizer, "prepare", logged(Optimizer.prepare)),
        mock.patch.object(Optimizer, "_prepare", logged(Optimizer._prepare)),
    ):
        trainer.train()
    return events


def test_lars_has_its_tables_before_the_host_waits_for_the_norm(tmp_path, one_rank):
    assert one_rank.run(events_of_stage_0, str(tmp_path)) == [["prepare", "_prepare", "wait"]]


def events_of_stage_3(out: str) -> list[str]:
    """The order in which shards are written, gathers start, and the gathers' stream is told to wait, over two steps."""
    from deepspeed.accelerator import get_accelerator

    from crossbatch.engine.config import Device, load_config, resolve
    from crossbatch.engine.optimizers import LARS as Optimizer

    cfg = resolve(load_config(None, [*BASE, *VIT, *LARS, *zero(3)]), dist.get_world_size(), Device("cpu"))
    trainer = pretrainer(cfg, out, "none", 2)
    backend: Any = trainer.state.step.backend
    events: list[str] = []
    gathers = mock.Mock()  # stands for DeepSpeed's stream; there are none on a CPU
    gathers.wait_stream = lambda stream: events.append(f"wait for {stream}")
    coordinator = backend.optimizer.parameter_offload.param_coordinator
    coordinator._PartitionedParameterCoordinator__allgather_stream = gathers
    backend._layout._gathers = backend._layout._gather_stream()

    def stream(_, entered):
        events.extend(["gather"] * (entered is gathers))
        return contextlib.nullcontext()

    def logged(write):
        def call(*args, **kwargs):
            events.append("write")
            return write(*args, **kwargs)

        return call

    with (
        mock.patch.object(type(get_accelerator()), "stream", stream),
        mock.patch.object(Optimizer, "step", logged(Optimizer.step)),
        mock.patch.object(torch, "_foreach_lerp_", logged(torch._foreach_lerp_)),
        mock.patch.object(torch.cuda, "current_stream", lambda: "compute"),
    ):
        trainer.train()
        events.append("write")  # as `resume` does into the shards that it was given
        backend.sync_master_weights(2)
        backend.model.eval()
        backend("embed", torch.zeros(2, 3, 16, 16))
    return events


def test_stage_3_gathers_only_after_the_shards_are_written(tmp_path, pools):
    for events in pools(2).run(events_of_stage_3, str(tmp_path)):
        text = " ".join(events)
        assert events.count("write") >= 2 * 2 + 1 and events[0] == "gather" and events[-1] == "gather"
        assert events.count("wait for compute") == 2 * 2 + 1  # optimizer, moving average; and what was loaded
        for written in text.split("write ")[1:]:
            assert "gather" not in written.split("wait for compute")[0], text


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(zero(1), marks=pytest.mark.slow),
        [*zero(1), "train_micro_batch_size_per_gpu=2"],
        pytest.param(zero(2), marks=pytest.mark.slow),
    ],
    ids=["1", "1-chunks", "2"],
)
def test_gradients_reduced_in_the_backward_pass_are_the_same(tmp_path, pools, overrides):
    """As the recipes of batch 4096 do it, in several buckets."""
    overlap = ["zero_optimization.overlap_comm=true", "zero_optimization.reduce_bucket_size=5000"]
    for name, more in (("behind", []), ("during", overlap)):
        pools(2).run(train, [*VIT, *LARS, *overrides, *more], str(tmp_path / name), 4)
    assert losses(tmp_path / "during") == losses(tmp_path / "behind")


@pytest.mark.long
def test_field_deepspeed_prints_what_it_is_asked_to(tmp_path, one_rank):
    """Its timers and logs change no loss."""
    asked = ["steps_per_print=1", "memory_breakdown=true", "dump_state=true"]
    asked.append('comms_logger={"enabled": true, "verbose": false}')
    for name, more in (("plain", []), ("asked", asked)):
        assert one_rank.run(run, [*VIT, *ADAMW, *zero(1), *more], str(tmp_path / name), 3) == [""]
    assert losses(tmp_path / "asked") == losses(tmp_path / "plain")
